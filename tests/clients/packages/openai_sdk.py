# SPDX-License-Identifier: Apache-2.0
"""The openai package: sync, async and streamed; whole, JSON and tool shapes."""

import asyncio
from typing import Any

import openai
from shapes import QUESTION, SCHEMA, TOOL, run

MESSAGES: Any = [{"role": "system", "content": "Answer briefly."}, {"role": "user", "content": QUESTION}]
OPTIONS: Any = {"max_tokens": 8, "temperature": 0}


def sync(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=url, api_key="none", max_retries=0)


def chat(url: str, model: str) -> str:
    answer = sync(url).chat.completions.create(model=model, messages=MESSAGES, **OPTIONS)
    return answer.choices[0].message.content or ""


def chat_stream(url: str, model: str) -> str:
    stream = sync(url).chat.completions.create(
        model=model, messages=MESSAGES, stream=True, stream_options={"include_usage": True}, **OPTIONS
    )
    return "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)


def history(url: str, model: str) -> str:
    """The answer is sent back as the package holds it."""
    client = sync(url)
    answer = client.chat.completions.create(model=model, messages=MESSAGES, **OPTIONS).choices[0].message
    messages = [*MESSAGES, answer.model_dump(), {"role": "user", "content": QUESTION}]
    return client.chat.completions.create(model=model, messages=messages, **OPTIONS).choices[0].message.content or ""


def completion(url: str, model: str) -> str:
    return sync(url).completions.create(model=model, prompt=QUESTION, **OPTIONS).choices[0].text


def completion_stream(url: str, model: str) -> str:
    stream = sync(url).completions.create(model=model, prompt=QUESTION, stream=True, **OPTIONS)
    return "".join(chunk.choices[0].text for chunk in stream if chunk.choices)


def async_chat(url: str, model: str) -> str:
    async def ask() -> str:
        async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
            answer = await client.chat.completions.create(model=model, messages=MESSAGES, **OPTIONS)
            return answer.choices[0].message.content or ""

    return asyncio.run(ask())


def async_stream(url: str, model: str) -> str:
    async def ask() -> str:
        async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
            stream = await client.chat.completions.create(model=model, messages=MESSAGES, stream=True, **OPTIONS)
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices])

    return asyncio.run(ask())


def embedding(url: str, model: str) -> str:
    return str(len(sync(url).embeddings.create(model=model, input=QUESTION).data[0].embedding))


def json_schema(url: str, model: str) -> str:
    form: Any = {"type": "json_schema", "json_schema": SCHEMA}
    answer = sync(url).chat.completions.create(model=model, messages=MESSAGES, response_format=form, **OPTIONS)
    return answer.choices[0].message.content or ""


def tools(url: str, model: str) -> str:
    given: Any = [TOOL]
    answer = sync(url).chat.completions.create(model=model, messages=MESSAGES, tools=given, **OPTIONS)
    return str(answer.choices[0].message.tool_calls)


SHAPES = (
    *(chat, chat_stream, history, completion, completion_stream, async_chat, async_stream),
    *(embedding, json_schema, tools),
)

if __name__ == "__main__":
    run("openai", {shape.__name__: shape for shape in SHAPES})
