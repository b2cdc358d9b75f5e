# SPDX-License-Identifier: Apache-2.0
"""AsyncLLM: streams, consumers that are slow or leave, faults, and what is done between steps."""

import asyncio
import gc
import itertools
import threading
import time
import weakref
from collections.abc import Callable, Coroutine, Generator, Iterable
from concurrent.futures import Future
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest

from jaxserve.async_llm import AsyncLLM
from jaxserve.engine.execute import weights
from jaxserve.errors import EngineError, JaxserveError, OverloadedError, RequestError
from jaxserve.frontend.outputs import OutputBuilder
from jaxserve.types.outputs import RequestOutput
from jaxserve.types.sampling_params import BeamSearchParams, RequestOutputKind, SamplingParams
from tests import tiny_llm
from tests.tiny_llm import Reference

CUMULATIVE, DELTA, FINAL_ONLY = RequestOutputKind
GREEDY = SamplingParams(temperature=0, max_tokens=6)
ENDLESS = replace(GREEDY, max_tokens=100, ignore_eos=True)
PROMPT = list(range(40, 60))


@pytest.fixture(scope="module")
def shared() -> Generator[AsyncLLM]:
    engine = tiny_llm.make_async()
    yield engine
    run(engine.shutdown())


@pytest.fixture
def engine(shared: AsyncLLM) -> Generator[AsyncLLM]:
    yield shared
    run(settled(shared))


@pytest.fixture
def slowly(engine: AsyncLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asked for first is still under way when the rest was asked."""
    step = engine._engine.step
    monkeypatch.setattr(engine._engine, "step", lambda: (time.sleep(0.02), step())[1])


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference(tiny_llm.params())


def run[T](work: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(asyncio.wait_for(work, 100))


async def settled(engine: AsyncLLM) -> None:
    """Waits until the engine holds nothing."""
    while (found := await engine.metrics()).running or found.waiting or found.used_blocks:
        await asyncio.sleep(0.005)
    assert not engine._client.names() and not engine._thread._streams


async def outputs(engine: AsyncLLM, prompt: Any, params: SamplingParams, **options: Any) -> list[RequestOutput]:
    return [output async for output in engine.generate(prompt, params, **options)]


async def answer(engine: AsyncLLM, prompt: Any, params: SamplingParams, **options: Any) -> list[int]:
    return (await outputs(engine, prompt, params, **options))[-1].outputs[0].token_ids


def flat[T](lists: Iterable[list[T]]) -> list[T]:
    return list(itertools.chain.from_iterable(lists))


# --- streams --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", list(RequestOutputKind))
def test_streams_say_what_the_model_says(engine: AsyncLLM, reference: Reference, kind: RequestOutputKind) -> None:
    async def work() -> None:
        prompts = [PROMPT, [5], [6, 7], [8], [9], [10]]
        params = replace(GREEDY, output_kind=kind)
        found = await asyncio.gather(*(outputs(engine, prompt, params) for prompt in prompts))
        for prompt, parts in zip(prompts, found, strict=True):
            assert [part.finished for part in parts] == [False] * (len(parts) - 1) + [True]
            tokens = [part.outputs[0].token_ids for part in parts]
            texts = [part.outputs[0].text for part in parts]
            whole = flat(tokens) if kind is DELTA else tokens[-1]
            assert whole == reference.greedy(prompt, 6)
            text = "".join(texts) if kind is DELTA else texts[-1]
            assert text == engine.get_tokenizer().decode(whole)
            assert len(parts) == 1 or kind is not FINAL_ONLY
            assert all(part.prompt_token_ids == prompt for part in parts)

    run(work())


def test_samples_logprobs_and_stop_strings(engine: AsyncLLM, reference: Reference) -> None:
    async def work() -> None:
        params = SamplingParams(n=3, seed=1, max_tokens=4, logprobs=2, prompt_logprobs=0, output_kind=DELTA)
        whole = (await outputs(engine, PROMPT, replace(params, output_kind=FINAL_ONLY)))[-1]
        parts = await outputs(engine, PROMPT, params)
        for sample in whole.outputs:
            own = [other for part in parts for other in part.outputs if other.index == sample.index]
            assert flat(other.token_ids for other in own) == sample.token_ids
            assert flat(other.logprobs or [] for other in own) == sample.logprobs
        assert flat(part.prompt_logprobs or [] for part in parts) == whole.prompt_logprobs
        text = engine.get_tokenizer().token_text(reference.greedy([6, 7], 3)[2])
        [*_, last] = await outputs(engine, [6, 7], replace(ENDLESS, stop=text))
        assert (last.outputs[0].finish_reason, last.outputs[0].stop_reason) == ("stop", text)
        [*_, again] = await outputs(engine, [6, 7], GREEDY, request_id=last.request_id)  # at once, by the same id
        assert (again.request_id, again.outputs[0].finish_reason) == (last.request_id, "length")

    run(work())


def test_what_a_slow_consumer_missed_comes_as_one(engine: AsyncLLM, reference: Reference) -> None:
    async def work(kind: RequestOutputKind) -> None:
        found: list[RequestOutput] = []
        params = replace(GREEDY, max_tokens=20, n=1, logprobs=1, output_kind=kind)
        async for output in engine.generate(PROMPT, params):
            found.append(output)
            while (await engine.metrics()).running and len(found) == 1:
                await asyncio.sleep(0.01)
        assert len(found) <= 3  # the first, what came meanwhile, and perhaps the very last
        tokens = [output.outputs[0].token_ids for output in found]
        assert (flat(tokens) if kind is DELTA else tokens[-1]) == reference.greedy(PROMPT, 20)
        assert sum(len(output.outputs[0].logprobs or ()) for output in found if kind is DELTA) in (0, 20)
        assert found[-1].finished

    run(work(CUMULATIVE))
    run(work(DELTA))


def test_one_call_of_the_loop_for_each_step(engine: AsyncLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    async def work() -> None:
        loop = asyncio.get_running_loop()
        calls: list[Any] = []
        monkeypatch.setattr(loop, "call_soon_threadsafe", tiny_llm.counted(loop.call_soon_threadsafe, calls))
        before = (await engine.metrics()).steps
        await asyncio.gather(*(answer(engine, [i, i + 1], GREEDY) for i in range(12)))
        steps = (await engine.metrics()).steps - before
        assert 0 < len(calls) <= steps + 4  # 12 requests of 6 tokens; two for the metrics

    run(work())


def test_a_loop_that_does_not_turn_is_called_once(engine: AsyncLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    async def work() -> None:
        loop = asyncio.get_running_loop()
        stream = engine.generate(PROMPT, replace(GREEDY, max_tokens=30))
        await anext(stream)
        calls: list[Any] = []
        monkeypatch.setattr(loop, "call_soon_threadsafe", tiny_llm.counted(loop.call_soon_threadsafe, calls))
        while engine._engine.unfinished:
            time.sleep(0.01)
        assert len(calls) <= 1
        assert (await anext(stream)).outputs[0].token_ids
        await stream.aclose()

    run(work())


def test_consumers_in_several_loops(engine: AsyncLLM, reference: Reference) -> None:
    found: dict[int, list[int]] = {}

    def consume(first: int) -> None:
        found[first] = run(answer(engine, [first, first + 1], GREEDY))

    threads = [threading.Thread(target=consume, args=(first,)) for first in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {first: reference.greedy([first, first + 1], 6) for first in range(5)}


def test_a_conversation(engine: AsyncLLM) -> None:
    async def work() -> None:
        messages = [{"role": "user", "content": "hello"}]
        text = engine.get_tokenizer().chat_text(messages)
        ids = engine.get_tokenizer().encode(text, add_special_tokens=False)
        found = [output async for output in engine.chat(messages, GREEDY, "mine")]
        assert (found[-1].request_id, found[-1].prompt, found[-1].prompt_token_ids) == ("mine", text, ids)
        assert found[-1].outputs[0].token_ids == await answer(engine, ids, GREEDY)
        bare = engine.get_tokenizer().chat_text(messages, add_generation_prompt=False)
        async with aclosing(engine.chat(messages, ENDLESS, add_generation_prompt=False)) as stream:
            assert (await anext(stream)).prompt == bare != text
        with pytest.raises(RequestError, match="messages is empty"):
            await anext(engine.chat([]))

    run(work())


# --- ends -----------------------------------------------------------------------------------------------------------


def test_who_leaves_aborts(engine: AsyncLLM) -> None:
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
            break  # the loop closes what nobody holds

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


def test_a_loop_that_was_closed_under_its_streams(engine: AsyncLLM) -> None:
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


@pytest.mark.usefixtures("slowly")
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


@pytest.mark.usefixtures("slowly")
def test_refusals_leave_others_alone(engine: AsyncLLM, reference: Reference) -> None:
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


def test_a_full_queue_is_told_to_the_caller() -> None:
    async def work() -> None:
        async with tiny_llm.make_async(max_num_queued_reqs=1) as engine:
            tasks = [asyncio.create_task(outputs(engine, PROMPT, ENDLESS)) for _ in range(12)]
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
            assert any(isinstance(task.exception(), OverloadedError) for task in done)
            found = await asyncio.gather(*tasks, return_exceptions=True)
            assert sum(isinstance(each, list) for each in found) >= 1
            await settled(engine)

    run(work())


# --- between steps --------------------------------------------------------------------------------------------------


def test_weights_change_between_steps(engine: AsyncLLM, reference: Reference) -> None:
    new = tiny_llm.params(1)

    async def work() -> None:
        task = asyncio.create_task(outputs(engine, PROMPT, ENDLESS))
        while not (await engine.metrics()).running:
            await asyncio.sleep(0.001)
        await engine.update_weights(new, version=3)
        [*_, last] = await task
        assert last.outputs[0].policy_version == 3
        assert await answer(engine, PROMPT, GREEDY) == Reference(new).greedy(PROMPT, 6)
        with pytest.raises(JaxserveError, match="have no"):
            await engine.update_weights({})
        await engine.sleep()
        with pytest.raises(JaxserveError, match="is asleep"):
            await outputs(engine, PROMPT, GREEDY)
        await engine.update_weights(tiny_llm.params(0))
        await engine.wake_up()
        assert await answer(engine, PROMPT, GREEDY) == reference.greedy(PROMPT, 6)
        assert (await outputs(engine, PROMPT, GREEDY))[-1].num_cached_tokens == 16
        await engine.reset_prefix_cache()
        assert (await outputs(engine, PROMPT, GREEDY))[-1].num_cached_tokens == 0

    run(work())


def test_requests_do_not_wait_for_the_compiler(
    engine: AsyncLLM, reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Programs that convert parameters are compiled beside the steps, which go on meanwhile."""
    go_on, begun = threading.Event(), threading.Event()
    compiled = weights._compiled

    def slow(*args: Any) -> Any:
        begun.set()
        assert go_on.wait(60)
        return compiled(*args)

    async def work() -> None:
        for change in (engine.public_params, lambda: engine.update_weights(tiny_llm.params(0))):
            go_on.clear()
            begun.clear()
            weights._joining.cache_clear()
            weights._splitting.cache_clear()
            task = asyncio.ensure_future(change())
            await asyncio.to_thread(begun.wait, 60)
            assert await answer(engine, PROMPT, GREEDY) == reference.greedy(PROMPT, 6)
            assert not task.done()
            go_on.set()
            await task

    monkeypatch.setattr(weights, "_compiled", slow)
    run(work())


def test_public_params_are_copies(engine: AsyncLLM, reference: Reference) -> None:
    async def work() -> None:
        public = await engine.public_params()
        for got, wanted in zip(*map(jax.tree.leaves, (public, tiny_llm.params(0))), strict=True):
            np.testing.assert_array_equal(got, wanted)
            got.delete()
        assert await answer(engine, PROMPT, GREEDY) == reference.greedy(PROMPT, 6)
        shared = await engine.public_params(copy=False)
        assert shared["final_norm"]["weight"] is engine._engine.runner.params["final_norm"]["weight"]
        await engine.sleep()
        with pytest.raises(JaxserveError, match="the engine is asleep; wake it first"):
            await engine.public_params()
        await engine.wake()

    run(work())


def test_the_thread_sleeps_when_there_is_nothing_to_do(engine: AsyncLLM) -> None:
    run(answer(engine, PROMPT, GREEDY))
    run(settled(engine))
    thread = engine._thread._thread
    assert thread.ident is not None
    clock = time.pthread_getcpuclockid(thread.ident)
    before = time.clock_gettime(clock)
    time.sleep(0.3)
    assert time.clock_gettime(clock) - before < 0.01


# --- beams ----------------------------------------------------------------------------------------------------------


def test_beam_searches_run_beside_other_requests(engine: AsyncLLM, reference: Reference) -> None:
    searches = [
        (prompt, BeamSearchParams(beam_width=width, max_tokens=6, length_penalty=0.5))
        for prompt, width in ((PROMPT, 4), ([5], 1), ([7, 8, 9], 2), (PROMPT[:9], 3))
    ]
    expected = [tiny_llm.make().beam_search([prompt], params)[0] for prompt, params in searches]

    async def work() -> None:
        greedy, *found = await asyncio.gather(
            answer(engine, PROMPT, GREEDY), *(engine.beam_search(prompt, params) for prompt, params in searches)
        )
        assert greedy == reference.greedy(PROMPT, 6)
        for each, right in zip(found, expected, strict=True):
            assert not isinstance(each, list)
            assert [beam.tokens for beam in each.sequences] == [beam.tokens for beam in right.sequences]
            assert [beam.text for beam in each.sequences] == [beam.text for beam in right.sequences]
            scores = [beam.cum_logprob for beam in right.sequences]
            assert [beam.cum_logprob for beam in each.sequences] == pytest.approx(scores, abs=1e-3)

    run(work())


@pytest.mark.usefixtures("slowly")
def test_a_search_ends_with_its_caller_an_abort_or_a_timeout(engine: AsyncLLM) -> None:
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


# --- faults and the end ---------------------------------------------------------------------------------------------


def test_a_fault_ends_every_stream_and_refuses_what_comes_later(monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_a_fault_in_the_text_of_one_request_is_its_own(
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


def test_an_engine_that_nobody_holds_ends() -> None:
    engine = tiny_llm.make_async()
    run(answer(engine, PROMPT, GREEDY))
    thread, held = engine._thread._thread, weakref.ref(engine)
    del engine
    gc.collect()
    assert held() is None
    thread.join(10)
    assert not thread.is_alive()


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
