# SPDX-License-Identifier: Apache-2.0
"""openai-agents with chat completions instead of responses, as its documentation has it for other servers."""

import asyncio
from typing import Any

from agents import Agent, ModelSettings, OpenAIChatCompletionsModel, Runner, function_tool, set_tracing_disabled
from openai import AsyncOpenAI
from shapes import QUESTION, run


@function_tool
def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


def agent(url: str, model: str, **more: Any) -> Agent[Any]:
    set_tracing_disabled(True)
    client = AsyncOpenAI(base_url=url, api_key="none", max_retries=0)
    chat = OpenAIChatCompletionsModel(model=model, openai_client=client)
    settings = ModelSettings(temperature=0, max_tokens=8)
    return Agent(name="helper", instructions="Answer briefly.", model=chat, model_settings=settings, **more)


def chat(url: str, model: str) -> str:
    return str(Runner.run_sync(agent(url, model), QUESTION).final_output)


def history(url: str, model: str) -> str:
    first = Runner.run_sync(agent(url, model), QUESTION)
    talk: Any = [*first.to_input_list(), {"role": "user", "content": QUESTION}]
    return str(Runner.run_sync(agent(url, model), talk).final_output)


def chat_stream(url: str, model: str) -> str:
    async def ask() -> str:
        result = Runner.run_streamed(agent(url, model), QUESTION)
        async for _ in result.stream_events():
            pass
        return str(result.final_output)

    return asyncio.run(ask())


def tools(url: str, model: str) -> str:
    return str(Runner.run_sync(agent(url, model, tools=[add]), QUESTION).final_output)


SHAPES = (chat, chat_stream, history, tools)

if __name__ == "__main__":
    run("openai-agents", {shape.__name__: shape for shape in SHAPES})
