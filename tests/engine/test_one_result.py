# SPDX-License-Identifier: Apache-2.0
"""A request's result does not depend on other requests, on how its work is chunked, or where its KV comes from.

Random work runs in every mode of an engine, and each stream must equal that of the request alone. In float32, sums in
another order can decide a tie differently: two tokens that differ must be a tie, by an oracle with the model's logits.
"""

from collections import Counter
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jaxserve.models.spec import ModelSpec
from jaxserve.types.outputs import TokenLogprobs
from jaxserve.types.request import Request
from jaxserve.types.sampling_params import SamplingParams
from tests.engine.driver import (
    BLOCK,
    FULL,
    LONGEST,
    MIXED,
    WINDOWED,
    Driver,
    Known,
    Stream,
    Streams,
    alone,
    logits_of,
    public_of,
)
from tests.engine.model_oracle import Step
from tests.engine.workloads import Job, random_jobs, run

LEAST = LONGEST // BLOCK  # blocks that the longest sequence takes: with fewer there is no engine


@cache
def single(spec: ModelSpec) -> Driver:
    """The simplest engine: one step at a time, whole prompts, nothing shared."""
    return Driver(spec, async_scheduling=False, enable_prefix_caching=False)


def check(jobs: list[Job], got: Streams, wanted: Streams) -> None:
    for job in jobs:
        names = [(job.request.id, index) for index in range(job.request.params.n)]
        for name in names:
            _same(job, name[1], got[name], wanted[name])
        # Whichever sample tells them: where the first is aborted it is another.
        reported, right = ([entry for name in names for entry in of[name].prompt_logprobs] for of in (got, wanted))
        assert len(reported) == len(right) or all(got[name].finish_reason == "abort" for name in names)
        _close(reported, right[: len(reported)])


def _same(job: Job, index: int, got: Stream, wanted: Stream) -> None:
    count = len(got.tokens)
    if got.finish_reason != "abort":
        assert got.finish_reason == wanted.finish_reason and got.stop_reason == wanted.stop_reason
    else:
        assert job.abort_after is not None and job.abort_index in (None, index)
    for i, (mine, other) in enumerate(zip(got.tokens, wanted.tokens, strict=False)):
        if mine != other:
            _tie(job.request, index, wanted.tokens[:i], {mine, other})
            count = i
            break
    else:
        assert got.tokens == wanted.tokens[:count]
        if got.finish_reason != "abort":
            assert count == len(wanted.tokens)
    assert len(got.logprobs) == (len(got.tokens) if job.request.params.logprobs is not None else 0)
    assert (got.embedding is not None) == (job.request.embed and got.finish_reason == "stop")
    if got.embedding and wanted.embedding:
        mine, other = (np.frombuffer(stream.embedding or b"", np.float32) for stream in (got, wanted))
        np.testing.assert_allclose(mine, other, rtol=1e-5, atol=1e-4)
    _close(got.logprobs[:count], wanted.logprobs[:count])


def _tie(request: Request, index: int, output: list[int], tokens: set[int]) -> None:
    text = [*request.prompt_token_ids, *output]
    possible = Step(request, index, output, logits_of(text)[-1]).possible()
    assert tokens <= possible, f"{request.id}.{index} after {len(output)} tokens: {tokens}, where {possible} are right"


def _close(got: list[TokenLogprobs], wanted: list[TokenLogprobs]) -> None:
    def numbers(of: list[TokenLogprobs]) -> np.ndarray:
        return np.array([x for entry in of for x in (entry.logprob, *entry.top_logprobs)])

    assert [entry.token for entry in got] == [entry.token for entry in wanted]
    assert [len(entry.top_tokens) for entry in got] == [len(entry.top_tokens) for entry in wanted]
    np.testing.assert_allclose(numbers(got), numbers(wanted), rtol=1e-5, atol=1e-4)


@settings(max_examples=16)
@example(
    seed=322, overlap=False, caching=False, budget=4, spare=LEAST, right=None
)  # another sample tells of the prompt
@given(
    seed=st.integers(0, 2**20),
    overlap=st.booleans(),
    caching=st.booleans(),
    budget=st.sampled_from([4, 5, 11, 32]),
    spare=st.sampled_from([LEAST, LEAST + 3, None]),
    right=st.sampled_from([None, 0.0, 0.8, 1.0]),
)
def test_any_workload_in_any_configuration(
    seed: int, overlap: bool, caching: bool, budget: int, spare: int | None, right: float | None
) -> None:
    jobs = random_jobs(seed)
    wanted = alone(single(FULL), [job.request for job in jobs])
    drafts = None if right is None else Known(wanted, rate=right)
    driver = Driver(
        FULL, async_scheduling=overlap, enable_prefix_caching=caching, budget=budget, spare=spare, drafts=drafts
    )
    check(jobs, run(driver, jobs), wanted)
    check(jobs, run(driver, jobs), wanted)  # what it finds in the prefix cache now


WAYS: dict[str, dict[str, Any]] = {
    "whole": dict(async_scheduling=False, enable_prefix_caching=False),
    "overlapped": dict(),
    "chunks": dict(budget=5),
    "scarce": dict(spare=LEAST),
    "scarce chunks, one at a time": dict(spare=LEAST, budget=7, async_scheduling=False),
    "scarce and nothing cached": dict(spare=LEAST, budget=16, enable_prefix_caching=False),
    "drafted": dict(),
    "drafted, one at a time": dict(async_scheduling=False),
    "drafted and scarce": dict(spare=LEAST),
}


@pytest.mark.parametrize("spec", [FULL, WINDOWED, MIXED], ids=["full", "windowed", "mixed"])
def test_the_same_workload_in_every_configuration(spec: ModelSpec) -> None:
    """Work that certainly preempts, copies, hits the cache, is cut into chunks; with windows all rows ask for
    everything, so that few programs do."""
    seen: Counter[str] = Counter()
    for seed in range(4):
        jobs = random_jobs(seed, count=9, always={} if spec is FULL else {"logprobs": 2, "prompt_logprobs": None})
        wanted = alone(single(spec), [job.request for job in jobs])
        for way, options in WAYS.items():
            driver = Driver(spec, drafts=Known(wanted, rate=0.9) if "drafted" in way else None, **options)
            check(jobs, run(driver, jobs), wanted)
            seen["copies"] += driver.copied
            seen["hits"] += driver.engine.metrics().cached_tokens
            seen[way] += driver.engine.metrics().steps
            if "scarce" in way:
                seen["preemptions"] += driver.scheduler.preemptions
            if way in ("overlapped", "scarce"):
                check(jobs, run(driver, jobs), wanted)
    assert all(seen[what] > 10 for what in ("copies", "hits", "preemptions")), seen
    assert seen["chunks"] > seen["overlapped"] + 30, seen
    assert seen["drafted"] < seen["overlapped"] - 20 and seen["drafted, one at a time"] < seen["whole"] - 40, seen


@pytest.mark.parametrize("turns", [1, 2, 3, 4])
def test_a_prompt_that_was_left_half_computed(turns: int) -> None:
    """The next request with the same prompt finds no half-full block."""
    prompt = list(range(30, 54))
    asked = [Request(id=name, prompt_token_ids=prompt, params=SamplingParams(temperature=0)) for name in "ab"]
    driver = Driver(budget=5)
    driver.add(asked[0])
    for _ in range(turns):
        driver.turn()
    driver.engine.abort("a")
    got = driver.finish(asked[1])["b", 0]
    assert got.cached == turns * 5 // BLOCK * BLOCK
    assert got.tokens == alone(single(FULL), [asked[1]])["b", 0].tokens


def test_tensor_parallel() -> None:
    """All rows ask for everything, and two run at once: few programs."""
    jobs = random_jobs(5, count=5, always={"logprobs": 2, "prompt_logprobs": None, "n": 1})
    forked = Request(id="forked", prompt_token_ids=list(range(11)), params=SamplingParams(n=2, seed=3, logprobs=2))
    jobs.insert(0, Job(forked, arrival=0))
    wanted = alone(single(FULL), [job.request for job in jobs])
    driver = Driver(FULL, params=public_of(FULL), tensor_parallel_size=4, max_num_seqs=2, budget=8, spare=LEAST)
    check(jobs, run(driver, jobs), wanted)
    assert driver.copied


def test_default_seeds_follow_the_order_of_arrival() -> None:
    """Requests without a seed get the engine's, independently of what happens to other requests."""
    free = [
        Request(id=str(i), prompt_token_ids=[5, 6, 7 + i], params=SamplingParams(temperature=1.5, max_tokens=6))
        for i in range(3)
    ]
    first, other = Driver(seed=7).finish(*free), Driver(seed=8).finish(*free)
    again = alone(Driver(seed=7), free)
    assert [s.tokens for s in first.values()] == [s.tokens for s in again.values()]
    assert [s.tokens for s in first.values()] != [s.tokens for s in other.values()]
