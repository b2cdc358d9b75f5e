# SPDX-License-Identifier: Apache-2.0
"""litellm, with the providers that its documentation names for such servers."""

import asyncio
import os
from typing import Any

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else it asks the network

import litellm
from shapes import QUESTION, SCHEMA, TOOL, run

MESSAGES: Any = [{"role": "system", "content": "Answer briefly."}, {"role": "user", "content": QUESTION}]
OPTIONS: Any = {"api_key": "none", "max_tokens": 8, "temperature": 0, "num_retries": 0}


def ask(url: str, model: str, messages: Any = MESSAGES, **more: Any) -> Any:
    return litellm.completion(model=f"hosted_vllm/{model}", api_base=url, messages=messages, **OPTIONS, **more)


def chat(url: str, model: str) -> str:
    return ask(url, model).choices[0].message.content


def chat_stream(url: str, model: str) -> str:
    return "".join(chunk.choices[0].delta.content or "" for chunk in ask(url, model, stream=True))


def history(url: str, model: str) -> str:
    """The answer of a stream is sent back as the package rebuilds it, with fields that it adds."""
    built = litellm.stream_chunk_builder(list(ask(url, model, stream=True)), messages=MESSAGES)
    talk = [*MESSAGES, built.choices[0].message.model_dump(), {"role": "user", "content": QUESTION}]
    return ask(url, model, talk).choices[0].message.content


def openai_provider(url: str, model: str) -> str:
    made = litellm.completion(model=f"openai/{model}", api_base=url, messages=MESSAGES, **OPTIONS)
    return made.choices[0].message.content


def async_chat(url: str, model: str) -> str:
    made = asyncio.run(litellm.acompletion(model=f"hosted_vllm/{model}", api_base=url, messages=MESSAGES, **OPTIONS))
    return made.choices[0].message.content


def completion(url: str, model: str) -> str:
    made = litellm.text_completion(model=f"text-completion-openai/{model}", api_base=url, prompt=QUESTION, **OPTIONS)
    return made.choices[0].text


def embedding(url: str, model: str) -> str:
    made = litellm.embedding(model=f"hosted_vllm/{model}", api_base=url, api_key="none", input=[QUESTION])
    return str(len(made.data[0]["embedding"]))


def json_schema(url: str, model: str) -> str:
    form = {"type": "json_schema", "json_schema": SCHEMA}
    return ask(url, model, response_format=form).choices[0].message.content


def tools(url: str, model: str) -> str:
    return str(ask(url, model, tools=[TOOL]).choices[0].message.tool_calls)


SHAPES = (chat, chat_stream, history, openai_provider, async_chat, completion, embedding, json_schema, tools)

if __name__ == "__main__":
    run("litellm", {shape.__name__: shape for shape in SHAPES})
