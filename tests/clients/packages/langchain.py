# SPDX-License-Identifier: Apache-2.0
"""langchain-openai: ChatOpenAI, OpenAI and OpenAIEmbeddings, as its guides use them."""

import asyncio
from typing import Any

from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings
from shapes import QUESTION, SCHEMA, TOOL, run

MESSAGES: Any = [SystemMessage("Answer briefly."), HumanMessage(QUESTION)]


def model_of(url: str, model: str, **more: Any) -> ChatOpenAI:
    return ChatOpenAI(base_url=url, api_key="none", model=model, temperature=0, max_tokens=8, max_retries=0, **more)


def chat(url: str, model: str) -> str:
    return str(model_of(url, model).invoke(MESSAGES).content)


def chat_stream(url: str, model: str) -> str:
    return "".join(str(chunk.content) for chunk in model_of(url, model).stream(MESSAGES))


def async_stream(url: str, model: str) -> str:
    async def ask() -> str:
        return "".join([str(chunk.content) async for chunk in model_of(url, model).astream(MESSAGES)])

    return asyncio.run(ask())


def history(url: str, model: str) -> str:
    talk = [*MESSAGES, AIMessage("12"), HumanMessage(QUESTION)]
    return str(model_of(url, model).invoke(talk).content)


def completion(url: str, model: str) -> str:
    made = OpenAI(base_url=url, api_key="none", model=model, temperature=0, max_tokens=8, max_retries=0)
    return made.invoke(QUESTION)


def embedding(url: str, model: str) -> str:
    made = OpenAIEmbeddings(base_url=url, api_key="none", model=model, check_embedding_ctx_length=False)
    return str(len(made.embed_query(QUESTION)))


def json_schema(url: str, model: str) -> str:
    schema = {"title": SCHEMA["name"], "description": "A number.", **SCHEMA["schema"]}
    return str(model_of(url, model).with_structured_output(schema).invoke(MESSAGES))


def tools(url: str, model: str) -> str:
    return str(model_of(url, model).bind_tools([TOOL]).invoke(MESSAGES).tool_calls)


SHAPES = (chat, chat_stream, async_stream, history, completion, embedding, json_schema, tools)

if __name__ == "__main__":
    run("langchain-openai", {shape.__name__: shape for shape in SHAPES})
