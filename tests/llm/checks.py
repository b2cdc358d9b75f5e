# SPDX-License-Identifier: Apache-2.0
"""What the Python API's tests share: parameters, short ways to run requests, and checks that an engine is empty."""

import asyncio
import itertools
from collections.abc import Coroutine, Iterable
from dataclasses import replace
from typing import Any

from jaxserve.async_llm import AsyncLLM
from jaxserve.llm import LLM
from jaxserve.text import tokenizer as tokenizers
from jaxserve.types.outputs import RequestOutput
from jaxserve.types.sampling_params import SamplingParams
from tests import tiny_llm

TOKENIZER = tokenizers.load(tiny_llm.TOKENIZER)
GREEDY = SamplingParams(temperature=0, max_tokens=6)
ENDLESS = replace(GREEDY, max_tokens=100, ignore_eos=True)
PROMPT = list(range(40, 60))
LONG = list(range(40, 80))  # more than a step computes at once


def tokens(outputs: list[RequestOutput]) -> list[list[int]]:
    return [sample.token_ids for output in outputs for sample in output.outputs]


def assert_empty(llm: LLM) -> None:
    found = llm.metrics()
    assert (found.running, found.waiting, found.used_blocks) == (0, 0, 0)
    assert not llm._engine.unfinished


def run[T](work: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(asyncio.wait_for(work, 100))


async def settled(engine: AsyncLLM) -> None:
    """Wait until the engine is empty."""
    while (found := await engine.metrics()).running or found.waiting or found.used_blocks:
        await asyncio.sleep(0.005)
    assert not engine._client.names() and not engine._thread._streams


async def outputs(engine: AsyncLLM, prompt: Any, params: SamplingParams, **options: Any) -> list[RequestOutput]:
    return [output async for output in engine.generate(prompt, params, **options)]


async def answer(engine: AsyncLLM, prompt: Any, params: SamplingParams, **options: Any) -> list[int]:
    return (await outputs(engine, prompt, params, **options))[-1].outputs[0].token_ids


def flat[T](lists: Iterable[list[T]]) -> list[T]:
    return list(itertools.chain.from_iterable(lists))
