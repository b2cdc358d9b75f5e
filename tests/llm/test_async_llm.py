# SPDX-License-Identifier: Apache-2.0
"""AsyncLLM: streams, slow consumers, several event loops, changes of weights, beam searches."""

import asyncio
import threading
import time
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest

from jaxserve.async_llm import AsyncLLM
from jaxserve.engine.execute import weights
from jaxserve.errors import JaxserveError, RequestError
from jaxserve.types.outputs import RequestOutput
from jaxserve.types.sampling_params import BeamSearchParams, RequestOutputKind, SamplingParams
from tests import tiny_llm
from tests.llm.checks import ENDLESS, GREEDY, PROMPT, answer, flat, outputs, run, settled
from tests.tiny_llm import Reference

CUMULATIVE, DELTA, FINAL_ONLY = RequestOutputKind


@pytest.mark.parametrize("kind", list(RequestOutputKind))
def test_streams_return_the_models_tokens(engine: AsyncLLM, reference: Reference, kind: RequestOutputKind) -> None:
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


def test_a_slow_consumer_gets_what_it_missed_in_one_output(engine: AsyncLLM, reference: Reference) -> None:
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


def test_each_step_calls_the_event_loop_once(engine: AsyncLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    async def work() -> None:
        loop = asyncio.get_running_loop()
        calls: list[Any] = []
        monkeypatch.setattr(loop, "call_soon_threadsafe", tiny_llm.counted(loop.call_soon_threadsafe, calls))
        before = (await engine.metrics()).steps
        await asyncio.gather(*(answer(engine, [i, i + 1], GREEDY) for i in range(12)))
        steps = (await engine.metrics()).steps - before
        assert 0 < len(calls) <= steps + 4  # 12 requests of 6 tokens; two for the metrics

    run(work())


def test_a_blocked_event_loop_is_called_once(engine: AsyncLLM, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_consumers_in_several_event_loops(engine: AsyncLLM, reference: Reference) -> None:
    found: dict[int, list[int]] = {}

    def consume(first: int) -> None:
        found[first] = run(answer(engine, [first, first + 1], GREEDY))

    threads = [threading.Thread(target=consume, args=(first,)) for first in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {first: reference.greedy([first, first + 1], 6) for first in range(5)}


def test_chat(engine: AsyncLLM) -> None:
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


def test_an_idle_engine_thread_uses_no_cpu_time(engine: AsyncLLM) -> None:
    run(answer(engine, PROMPT, GREEDY))
    run(settled(engine))
    thread = engine._thread._thread
    assert thread.ident is not None
    clock = time.pthread_getcpuclockid(thread.ident)
    before = time.clock_gettime(clock)
    time.sleep(0.3)
    assert time.clock_gettime(clock) - before < 0.01


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
