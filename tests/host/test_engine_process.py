# SPDX-License-Identifier: Apache-2.0
"""An engine in a real child process gives the results of one in this process, and keeps nothing of ended requests."""

import asyncio
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Coroutine, Generator
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxserve.config import EngineConfig
from jaxserve.errors import EngineError, JaxserveError, OverloadedError, RequestError
from jaxserve.frontend import wire
from jaxserve.frontend.beam_search import beam_search_output
from jaxserve.frontend.client import EngineClient
from jaxserve.frontend.process import EngineProcess, EngineState
from jaxserve.llm import LLM
from jaxserve.types.outputs import BeamSearchSequence, RequestOutput
from jaxserve.types.request import Request
from jaxserve.types.sampling_params import BeamSearchParams, RequestOutputKind, SamplingParams
from tests.host import living

CUMULATIVE, DELTA, FINAL_ONLY = RequestOutputKind
GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
ENDLESS = replace(GREEDY, max_tokens=100)
PROMPTS = ["hello there", [5], list(range(40, 60)), "a\nb"]


def run[T](work: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(asyncio.wait_for(work, living.PATIENCE))


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> EngineConfig:
    folder = living.write_model(tmp_path_factory.mktemp("model"))
    return EngineConfig(model=str(folder), **living.OPTIONS, max_num_queued_reqs=64)


class Shared:
    def __init__(self, engine: EngineProcess, front: EngineClient, states: list[EngineState]) -> None:
        self.engine, self.front, self.states = engine, front, states


@pytest.fixture(scope="module")
def module_shared(config: EngineConfig) -> Generator[Shared]:
    states: list[EngineState] = []
    with living.process(config, on_change=states.append) as engine:
        yield Shared(engine, living.front(engine, config), states)


@pytest.fixture
def shared(module_shared: Shared) -> Generator[Shared]:
    yield module_shared
    living.wait(lambda: at_rest(module_shared))


def at_rest(shared: Shared) -> bool:
    """Check that nothing of any request is left in either process."""
    stats = shared.engine.stats
    assert stats is not None and shared.engine.state.phase == "ready"
    held = stats.running, stats.waiting, stats.used_blocks, len(shared.engine._streams), len(shared.front.names())
    return not any(held) and not shared.engine._calls


@pytest.fixture(scope="module")
def llm(config: EngineConfig) -> LLM:
    return LLM(config.model, **living.OPTIONS)


def comparable(output: RequestOutput) -> RequestOutput:
    return replace(output, request_id="", num_cached_tokens=0)


# --- the same -------------------------------------------------------------------------------------------------------


def test_startup_is_reported(shared: Shared) -> None:
    details = [state.detail for state in shared.states if state.phase == "starting"]
    assert "opening the model" in details and "loading 100 %" in details
    loading = [state.since for state in shared.states if state.what == "loading"]
    assert len(set(loading)) == 1 and loading[0] > 0  # the time is that of the first report
    assert shared.states[-1] == EngineState("ready", "")
    opened = shared.engine.opened
    assert opened is not None and (opened.family, opened.layers, opened.dtype) == ("llama", 1, "float32")
    assert opened.weight_bytes == 4 * opened.parameters
    assert opened.limits.max_num_seqs == 2 and opened.limits.max_num_queued_reqs == 64


@pytest.mark.parametrize(
    "params",
    [
        replace(GREEDY, logprobs=3, prompt_logprobs=2),
        SamplingParams(seed=3, n=2, max_tokens=5, top_p=0.9, logit_bias={7: 5.0}, bad_words=["a"], min_tokens=2),
        SamplingParams(seed=4, temperature=0.5, max_tokens=20, stop=["\x0f", "ab"], repetition_penalty=1.3),
    ],
)
def test_the_same_as_in_this_process(shared: Shared, llm: LLM, params: SamplingParams) -> None:
    """Bitwise, so one at a time: other requests in a step change the last bits of log probabilities."""

    async def work() -> list[list[RequestOutput]]:
        return [await living.outputs(shared.front, prompt, params) for prompt in PROMPTS]

    expected = [llm.generate([prompt], params, use_tqdm=False)[0] for prompt in PROMPTS]
    assert [comparable(found[-1]) for found in run(work())] == [comparable(output) for output in expected]


def test_beams_are_the_same(shared: Shared, llm: LLM) -> None:
    params = BeamSearchParams(beam_width=2, max_tokens=6, length_penalty=0.5, ignore_eos=True)

    async def search(prompt: Any) -> list[BeamSearchSequence]:
        request = shared.front.preparer.prepare_beams(prompt, params)
        [output] = [output async for output in shared.front.outputs(request)]
        return beam_search_output(output, params, shared.front.preparer.tokenizer).sequences

    async def work() -> list[Any]:
        plain = living.outputs(shared.front, PROMPTS[2], GREEDY)
        return await asyncio.gather(*(search(prompt) for prompt in PROMPTS), plain)

    *found, _ = run(work())
    for sequences, output in zip(found, llm.beam_search(PROMPTS, params), strict=True):
        assert [each.tokens for each in sequences] == [each.tokens for each in output.sequences]
        assert [each.text for each in sequences] == [each.text for each in output.sequences]
        scores = [each.cum_logprob for each in output.sequences]  # other requests in a step change their last bits
        assert [each.cum_logprob for each in sequences] == pytest.approx(scores, abs=1e-4)


def test_embeddings_and_scores(shared: Shared, llm: LLM) -> None:
    async def work() -> None:
        intake = shared.front.preparer
        jobs = [intake.prepare(prompt, embed=True) for prompt in PROMPTS]
        for job in jobs:
            [output] = [output async for output in shared.front.outputs(job)]
            assert output.embedding is not None and output.finished
            assert output.embedding.dtype == np.float32 and output.embedding.shape == (64,)
            assert np.isfinite(output.embedding).all() and output.embedding.any()
        params = SamplingParams(prompt_logprobs=0, max_tokens=1, output_kind=FINAL_ONLY)
        [output] = await living.outputs(shared.front, PROMPTS[2], params, score_only=True)
        found = [next(iter(entry.values())).logprob for entry in (output.prompt_logprobs or [])[1:] if entry]
        assert found == [pytest.approx(value, abs=1e-5) for value in llm.logprobs(PROMPTS[2])[0]]

    run(work())


def test_deltas_and_times(shared: Shared) -> None:
    async def work() -> None:
        before = time.monotonic()
        stream = shared.front.open(shared.front.preparer.prepare(PROMPTS[0], replace(ENDLESS, output_kind=DELTA)))
        tokens: list[int] = []
        while not stream.finished:
            tokens += (await stream.next()).outputs[0].token_ids
        shared.front.close(stream)
        assert len(tokens) == 100
        times = [stream.arrival, stream.scheduled or 0, stream.first_output or 0, stream.last_output or 0]
        times = [before, *times, time.monotonic()]
        assert times == sorted(times) and times[3] < times[4]

    run(work())


def test_many_at_once(shared: Shared) -> None:
    async def work() -> None:
        assert shared.engine.stats is not None
        before = shared.engine.stats
        found = await asyncio.gather(*(living.outputs(shared.front, [i, i + 1], GREEDY) for i in range(50)))
        assert [len(outputs[-1].outputs[0].token_ids) for outputs in found] == [6] * 50
        after = await shared.front.call("metrics")
        assert (after.requests - before.requests, after.generated_tokens - before.generated_tokens) == (50, 300)
        assert after.prefix_queries - before.prefix_queries == 100

    run(work())


def test_requests_of_one_event_loop_turn_share_messages(shared: Shared, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    frame = wire.frame

    def noting(messages: Any) -> bytearray:
        sizes.append(len(messages))
        return frame(messages)

    async def work() -> None:
        jobs = [shared.front.preparer.prepare([i], GREEDY) for i in range(40)]
        monkeypatch.setattr(wire, "frame", noting)
        streams = [shared.front.open(job) for job in jobs]
        for stream in streams:
            while not stream.finished:
                await stream.next()
            shared.front.close(stream)
        assert sum(sizes) == 40 and len(sizes) <= 10

    run(work())


# --- ends -----------------------------------------------------------------------------------------------------------


def test_aborts_free_everything(shared: Shared) -> None:
    async def leave() -> None:
        async with aclosing(shared.front.outputs(shared.front.preparer.prepare(PROMPTS[2], ENDLESS))) as outputs:
            await anext(outputs)

    async def leave_unseen() -> None:
        stream = shared.front.open(shared.front.preparer.prepare(PROMPTS[2], ENDLESS))
        shared.front.close(stream)
        shared.front.close(stream)

    async def by_name() -> None:
        tasks = [asyncio.create_task(living.outputs(shared.front, [i], ENDLESS, request_id=f"r{i}")) for i in range(9)]
        while len(shared.front.names()) < 9:
            await asyncio.sleep(0.001)
        assert await shared.front.abort("r3") == 1
        assert await shared.front.abort("unknown") == 0
        assert (await tasks[3])[-1].outputs[0].finish_reason == "abort"
        assert await shared.front.abort() >= 1
        reasons = {(await task)[-1].outputs[0].finish_reason for task in tasks}
        assert "abort" in reasons and reasons <= {"abort", "length"}

    for way in (leave, leave_unseen, by_name):
        run(way())
        living.wait(lambda: at_rest(shared), seconds=10)


def test_requests_of_a_closed_event_loop_are_aborted(shared: Shared) -> None:
    loop = asyncio.new_event_loop()

    async def begin() -> None:
        stream = shared.front.open(shared.front.preparer.prepare(PROMPTS[2], ENDLESS))
        await stream.next()

    loop.run_until_complete(begin())
    loop.close()
    living.wait(lambda: not shared.engine._streams, seconds=10)
    shared.front._streams.clear()  # its consumer can close nothing any more


def test_a_deadline(shared: Shared) -> None:
    late = run(living.outputs(shared.front, [1, 2], ENDLESS, deadline=time.monotonic()))
    assert late[-1].outputs[0].finish_reason == "abort" and "deadline" in (late[-1].outputs[0].error or "")


def test_errors_keep_their_class(shared: Shared, config: EngineConfig) -> None:
    front = shared.front

    def unchecked(**fields: Any) -> Request:
        """Skip the checks in this process."""
        return Request(**{"id": "bad", "prompt_token_ids": [1], "params": replace(GREEDY, detokenize=False), **fields})

    async def refused(request: Request, words: str, field: str) -> None:
        with pytest.raises(RequestError, match=words) as caught:
            async for _ in front.outputs(request):
                pass
        assert type(caught.value) is RequestError and caught.value.field == field

    async def work() -> None:
        await refused(unchecked(prompt_token_ids=[VOCABULARY]), "0 to 425", "prompt")
        await refused(unchecked(prompt_token_ids=[]), "empty", "prompt")
        await refused(unchecked(prompt_token_ids=[1.5]), "cannot read", "prompt")
        await refused(unchecked(prompt_token_ids=[2**70]), "cannot be sent", "prompt")
        await refused(unchecked(cache_salt="\ud800"), "cannot be sent", "prompt")
        await refused(unchecked(params=replace(GREEDY, logprobs=9)), "max_logprobs", "logprobs")
        with pytest.raises(RequestError, match="in flight"):
            held = front.open(unchecked())
            try:
                front.open(unchecked())
            finally:
                front.close(held)
        with pytest.raises(JaxserveError, match="unknown sleep level 7") as caught:
            await front.call("sleep", level=7)
        assert type(caught.value) is JaxserveError
        with pytest.raises(EngineError, match="TypeError"):
            await front.call("sleep", levels=7)
        tasks = [asyncio.create_task(living.outputs(front, [i], ENDLESS)) for i in range(80)]
        found = await asyncio.gather(*tasks, return_exceptions=True)
        full = [each for each in found if isinstance(each, BaseException)]
        assert full and all(type(each) is OverloadedError and "max_num_queued_reqs" in str(each) for each in full)

    run(work())


VOCABULARY = living.VOCABULARY


def test_calls(shared: Shared, tmp_path: Path) -> None:
    async def work() -> None:
        front = shared.front
        for name in ("close", "update_weights", "__init__", "nothing"):
            with pytest.raises(JaxserveError, match="known: "):
                await front.call(name)
        [*_, first] = await living.outputs(front, PROMPTS[2], GREEDY)
        [*_, again] = await living.outputs(front, PROMPTS[2], GREEDY)
        assert again.num_cached_tokens == 16 and again.outputs == first.outputs
        await front.call("reset_prefix_cache")
        [*_, again] = await living.outputs(front, PROMPTS[2], GREEDY)
        assert again.num_cached_tokens == 0 and again.outputs == first.outputs
        await front.call("sleep", level=1)
        with pytest.raises(JaxserveError, match="is asleep"):
            await living.outputs(front, [1], GREEDY)
        await front.call("wake")
        [*_, again] = await living.outputs(front, PROMPTS[2], GREEDY)
        assert again.outputs == first.outputs
        await front.call("start_profile", folder=str(tmp_path / "trace"))
        await living.outputs(front, [1], GREEDY)
        assert await front.call("stop_profile") == tmp_path / "trace"
        assert any(path.suffix == ".pb" for path in (tmp_path / "trace").rglob("*"))

    run(work())


def test_the_child_rejects_unknown_calls(shared: Shared, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "CALLS", {**wire.CALLS, "close": None})  # of this process alone
    with pytest.raises(JaxserveError, match="no 'close'"):
        shared.engine.call("close").result(10)


def test_consumers_in_several_event_loops(shared: Shared) -> None:
    found: dict[int, int] = {}

    def consume(first: int) -> None:
        found[first] = len(run(living.outputs(shared.front, [first], GREEDY))[-1].outputs[0].token_ids)

    threads = [threading.Thread(target=consume, args=(first,)) for first in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == dict.fromkeys(range(5), 6)


def test_the_child_has_large_pages(shared: Shared) -> None:
    """Memory from malloc may use large pages; where that must be requested, the heap has the flag."""
    settings = Path(f"/proc/{shared.engine.pid}/environ").read_bytes().split(b"\0")
    assert f"GLIBC_TUNABLES={os.environ.get('GLIBC_TUNABLES', 'glibc.malloc.hugetlb=1')}".encode() in settings
    mode = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if "GLIBC_TUNABLES" not in os.environ and mode.exists() and "[madvise]" in mode.read_text():
        parts = re.split(r"(?m)^(?=[0-9a-f]+-[0-9a-f]+ )", Path(f"/proc/{shared.engine.pid}/smaps").read_text())
        heaps = [part for part in parts if part.partition("\n")[0].endswith("[heap]")]
        assert any(" hg" in heap[heap.index("VmFlags:") :] for heap in heaps)


def test_an_idle_child_uses_no_cpu_time(shared: Shared) -> None:
    def used() -> float:
        fields = Path(f"/proc/{shared.engine.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    living.wait(lambda: at_rest(shared))
    before = used()
    time.sleep(1)
    assert used() - before < 0.2


def test_the_parent_needs_no_jax() -> None:
    code = "import sys, jaxserve.frontend.client; print({'jax', 'jaxlib', 'flax'} & sys.modules.keys())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"
