# SPDX-License-Identifier: Apache-2.0
"""How AsyncLLM's requests end: consumers that leave, aborts, timeouts, rejections, faults, shutdown."""

import asyncio
import gc
import time
import weakref
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import jax
import pytest

from jaxserve.async_llm import AsyncLLM
from jaxserve.errors import EngineError, JaxserveError, OverloadedError, RequestError
from jaxserve.frontend.outputs import OutputBuilder
from jaxserve.types.outputs import RequestOutput
from jaxserve.types.sampling_params import BeamSearchParams, SamplingParams
from tests import tiny_llm
from tests.llm.checks import ENDLESS, GREEDY, PROMPT, answer, outputs, run, settled
from tests.tiny_llm import Reference


def test_a_consumer_that_leaves_aborts_its_request(engine: AsyncLLM) -> None:
    async def leave_the_loop() -> None:
        async with aclosing(engine.generate(PROMPT, ENDLESS)) as stream:
            async for _ in stream:
                break

    async def be_cancelled() -> None:
        task = asyncio.create_task(outputs(engine, PROMPT, ENDLESS))
        while not (await engine.metrics()).running:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    async def forget() -> None:
        async for _ in engine.generate(PROMPT, ENDLESS):
            break  # the event loop closes unreferenced generators

    async def end_the_loop() -> None:
        stream = engine.generate(PROMPT, ENDLESS)
        await anext(stream)
        kept.append(stream)

    kept: list[Any] = []

    async def in_time(leave: Callable[[], Coroutine[Any, Any, None]]) -> None:
        before = (await engine.metrics()).finished
        await leave()
        await settled(engine)
        after = (await engine.metrics()).finished
        assert (after["abort"], after["length"]) == (before["abort"] + 1, before["length"]), leave

    for leave in (leave_the_loop, be_cancelled, forget):
        run(in_time(leave))
    before = run(engine.metrics()).finished["abort"]
    run(end_the_loop())
    run(settled(engine))
    assert run(engine.metrics()).finished["abort"] == before + 1


def test_requests_of_a_closed_event_loop_are_aborted(engine: AsyncLLM) -> None:
    loop = asyncio.new_event_loop()
    stream = engine.generate(PROMPT, ENDLESS)
    before = run(engine.metrics()).finished["abort"]
    loop.run_until_complete(anext(stream))
    loop.close()
    while run(engine.metrics()).running:
        time.sleep(0.01)
    assert run(engine.metrics()).finished["abort"] == before + 1
    with pytest.raises(StopIteration):
        stream.aclose().send(None)


@pytest.mark.usefixtures("slow_steps")
def test_abort_by_id(engine: AsyncLLM) -> None:
    async def work() -> None:
        parts: list[RequestOutput] = []
        async for output in engine.generate(PROMPT, ENDLESS, "mine"):
            parts.append(output)
            if len(parts) == 1:
                await engine.abort("mine")
        assert parts[-1].request_id == "mine"
        assert parts[-1].outputs[0].finish_reason == "abort"
        assert parts[-1].finished
        await engine.abort("mine")
        await engine.abort("unknown")

    run(work())


def test_a_timeout_ends_a_request(engine: AsyncLLM) -> None:
    async def work() -> None:
        params = SamplingParams(max_tokens=40, ignore_eos=True)
        *_, last = await outputs(engine, [1, 2, 3], params, timeout=1e-6)
        assert last.outputs[0].finish_reason == "abort" and "deadline" in (last.outputs[0].error or "")
        for timeout in (0, -1, float("nan"), "1"):
            with pytest.raises(RequestError, match="timeout"):
                await outputs(engine, [1, 2, 3], params, timeout=timeout)
        await settled(engine)

    run(work())


@pytest.mark.usefixtures("slow_steps")
def test_beam_searches_end_by_cancellation_abort_and_timeout(engine: AsyncLLM) -> None:
    params = BeamSearchParams(beam_width=3, max_tokens=60, ignore_eos=True)

    async def work() -> None:
        left, aborted, late, whole = tasks = [
            asyncio.create_task(engine.beam_search([i], params, request_id=f"search {i}", timeout=timeout))
            for i, timeout in enumerate((None, None, 0.3, None))
        ]
        while len(engine._client.names()) < len(tasks):
            await asyncio.sleep(0.005)
        await asyncio.sleep(0.1)
        left.cancel()
        await engine.abort("search 1")
        for task in (aborted, late):
            assert {beam.finish_reason for beam in (await task).sequences} == {"abort"}
        assert {beam.finish_reason for beam in (await whole).sequences} == {"length"}
        with pytest.raises(asyncio.CancelledError):
            await left
        with pytest.raises(RequestError, match="beam_width is 5"):
            await engine.beam_search([1], replace(params, beam_width=5))

    run(work())


@pytest.mark.usefixtures("slow_steps")
def test_rejected_requests_do_not_affect_others(engine: AsyncLLM, reference: Reference) -> None:
    bad: list[tuple[Any, SamplingParams, str]] = [
        ([], GREEDY, "empty"),
        ([426], GREEDY, "426"),
        ([-1], GREEDY, "-1"),
        ([1] * 128, GREEDY, "128 tokens"),
        ([1], SamplingParams(n=5), "n is 5"),
        ([1], SamplingParams(logprobs=9), "logprobs is 9"),
        ([1], SamplingParams(logit_bias={500: 1}), "500"),
        ({"prompt": "x", "unknown": 1}, GREEDY, "unknown"),
        ([1], {"n": 1}, "type dict"),  # pyright: ignore[reportAssignmentType]
    ]

    async def work() -> None:
        canary = asyncio.create_task(answer(engine, PROMPT, replace(GREEDY, max_tokens=30), request_id="canary"))
        while not (await engine.metrics()).running:
            await asyncio.sleep(0.001)
        for prompt, params, words in bad:
            with pytest.raises(RequestError, match=words):
                await outputs(engine, prompt, params)
        with pytest.raises(RequestError, match="'canary' is already in flight"):
            await outputs(engine, [1], GREEDY, request_id="canary")
        with pytest.raises(RequestError, match="scheduling_policy"):
            await outputs(engine, [1], GREEDY, priority=1)
        with pytest.raises(JaxserveError, match="in flight"):
            await engine.sleep()
        assert not canary.done()
        assert await canary == reference.greedy(PROMPT, 30)

    run(work())


def test_a_full_queue_raises_an_overloaded_error() -> None:
    async def work() -> None:
        async with tiny_llm.make_async(max_num_queued_reqs=1) as engine:
            tasks = [asyncio.create_task(outputs(engine, PROMPT, ENDLESS)) for _ in range(12)]
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
            assert any(isinstance(task.exception(), OverloadedError) for task in done)
            found = await asyncio.gather(*tasks, return_exceptions=True)
            assert sum(isinstance(each, list) for each in found) >= 1
            await settled(engine)

    run(work())


def test_an_engine_fault_ends_all_streams_and_rejects_later_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = tiny_llm.make_async()
    launch, launched = engine._engine.runner.launch, 0
    late: list[Future[None]] = []

    def broken(packed: Any) -> Any:
        nonlocal launched
        launched += 1
        if launched > 5:
            late.append(engine._thread.call(lambda: None))  # comes when it is too late
            raise ValueError("of the device")
        return launch(packed)

    monkeypatch.setattr(engine._engine.runner, "launch", broken)

    async def work() -> None:
        engine.check_health()
        found = await asyncio.gather(
            *(outputs(engine, [i], ENDLESS) for i in range(8)),
            *(engine.beam_search([i], BeamSearchParams(beam_width=2, max_tokens=9)) for i in range(3)),
            engine.metrics(),
            return_exceptions=True,
        )
        assert all(isinstance(each, EngineError) and "of the device" in str(each) for each in found[:11])
        for later in (outputs(engine, [1], GREEDY), engine.metrics(), engine.update_weights({})):
            with pytest.raises(EngineError, match="of the device"):
                await later
        with pytest.raises(EngineError, match="of the device"):
            engine.check_health()
        await engine.shutdown()

    run(work())
    assert isinstance(late[0].exception(timeout=10), EngineError)
    assert not engine._thread._thread.is_alive()


def test_a_fault_in_one_requests_text_does_not_affect_others(
    engine: AsyncLLM, reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    add = OutputBuilder.add

    def faulty(self: OutputBuilder, update: Any) -> Any:
        if self._prompt_token_ids == [5]:
            raise ValueError("of the text")
        return add(self, update)

    monkeypatch.setattr(OutputBuilder, "add", faulty)

    async def work() -> None:
        found = await asyncio.gather(
            outputs(engine, [5], ENDLESS), answer(engine, PROMPT, GREEDY), return_exceptions=True
        )
        assert isinstance(found[0], EngineError) and "of the text" in str(found[0])
        assert found[1] == reference.greedy(PROMPT, 6)

    run(work())


def test_shutdown_ends_streams() -> None:
    async def work() -> None:
        async with tiny_llm.make_async() as engine:
            stream = engine.generate(PROMPT, ENDLESS)
            await anext(stream)
        with pytest.raises(EngineError, match="shut down"):
            while True:
                await anext(stream)
        with pytest.raises(EngineError, match="shut down"):
            await outputs(engine, PROMPT, GREEDY)
        await engine.abort("unknown")
        await engine.shutdown()
        assert all(pool.is_deleted() for pool in jax.tree.leaves(engine._engine.runner.cache))

    run(work())


def test_an_engine_without_references_ends() -> None:
    engine = tiny_llm.make_async()
    run(answer(engine, PROMPT, GREEDY))
    thread, held = engine._thread._thread, weakref.ref(engine)
    del engine
    gc.collect()
    assert held() is None
    thread.join(10)
    assert not thread.is_alive()
