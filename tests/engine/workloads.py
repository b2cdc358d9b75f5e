# SPDX-License-Identifier: Apache-2.0
"""Random work for an engine, by seed: requests with their times of arrival and abort, and how to run it."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from jaxserve.types.request import Request
from jaxserve.types.sampling_params import SamplingParams
from tests.engine.driver import VOCABULARY, Driver, Streams


@dataclass(frozen=True)
class Job:
    request: Request
    arrival: int  # the turn before which it comes
    abort_after: int | None = None  # so many turns
    abort_index: int | None = None  # of one sample alone


def random_jobs(seed: int, *, count: int = 7, always: dict[str, Any] | None = None) -> list[Job]:
    """`always` are parameters that each request has."""
    random = np.random.default_rng(seed)
    stems = [random.integers(VOCABULARY, size=24).tolist() for _ in range(2)]
    jobs: list[Job] = []
    for i in range(count):
        prompt = stems[random.integers(2)][: int(random.choice([0, 7, 8, 16, 17, 24]))]
        prompt = prompt + random.integers(VOCABULARY, size=int(random.integers(1, 8))).tolist()
        params = _params(random, always or {})
        words = [tuple(random.integers(VOCABULARY, size=size).tolist()) for size in (1, 1, 2, 3)]
        request = Request(
            id=f"{seed}.{i}",
            prompt_token_ids=prompt,
            params=params,
            bad_word_ids=tuple(words) if random.random() < 0.15 else (),
            cache_salt="salt" if random.random() < 0.15 else None,
            score_only=params.prompt_logprobs is not None and params.n == 1 and random.random() < 0.3,
        )
        aborted = random.random() < 0.25
        jobs.append(
            Job(
                request,
                arrival=int(random.integers(0, 12)),
                abort_after=int(random.integers(0, 8)) if aborted else None,
                abort_index=int(random.integers(params.n)) if random.random() < 0.5 else None,
            )
        )
    if always is None:
        jobs += [_embedding(job) for job in jobs[:2]]
    return sorted(jobs, key=lambda job: job.arrival)


def _embedding(job: Job) -> Job:
    """A request with the same prompt, a little later."""
    request = replace(job.request, id=f"{job.request.id}.embedding", params=SamplingParams(), bad_word_ids=())
    return Job(replace(request, score_only=False, embed=True), job.arrival + 1, abort_after=job.abort_after)


def _params(random: np.random.Generator, always: dict[str, Any]) -> SamplingParams:
    def maybe(share: float, value: Any, otherwise: Any) -> Any:
        return value if random.random() < share else otherwise

    def ids(count: int) -> list[int]:
        return random.choice(VOCABULARY, count, replace=False).tolist()

    kind = random.choice(["greedy", "random", "filtered"])
    given: dict[str, Any] = dict(
        temperature=0.0,
        max_tokens=maybe(0.1, None, int(random.integers(1, 20))),
        stop_token_ids=maybe(0.3, ids(4), None),
        ignore_eos=maybe(0.3, True, False),
        logprobs=maybe(0.4, int(random.choice([0, 2, 5])), None),
        prompt_logprobs=maybe(0.2, int(random.choice([0, 3])), None),
        skip_reading_prefix_cache=maybe(0.1, True, None),
    )
    if kind != "greedy":
        given |= dict(temperature=float(random.uniform(0.3, 2)), seed=int(random.integers(2**40)))
        given |= dict(n=maybe(0.6, int(random.integers(2, 4)), 1))
    if kind == "filtered":
        given |= dict(
            top_k=maybe(0.5, int(random.integers(1, 30)), 0),
            top_p=maybe(0.6, float(random.uniform(0.3, 0.95)), 1.0),
            min_p=maybe(0.3, float(random.uniform(0.01, 0.2)), 0.0),
        )
    if random.random() < 0.5:
        given |= dict(
            repetition_penalty=maybe(0.4, float(random.uniform(0.7, 1.6)), 1.0),
            frequency_penalty=maybe(0.3, float(random.uniform(-1, 1)), 0.0),
            presence_penalty=maybe(0.3, float(random.uniform(-1, 1)), 0.0),
            logit_bias=maybe(0.3, dict(zip(ids(5), random.uniform(-5, 5, 5).tolist(), strict=True)), None),
            allowed_token_ids=maybe(0.2, ids(40), None),
            min_tokens=maybe(0.4, int(random.integers(0, given["max_tokens"] or 4)), 0),
        )
    return SamplingParams(**given | always)


def run(driver: Driver, jobs: list[Job]) -> Streams:
    """Run all requests, each at its time."""
    waiting = list(jobs)
    streams: Streams = {}
    start = driver.turns
    aborts = [job for job in jobs if job.abort_after is not None]
    for _ in range(3000):
        while waiting and waiting[0].arrival <= driver.turns - start:
            driver.add(waiting.pop(0).request)
        streams |= driver.streams
        for job in aborts:
            if job.arrival + (job.abort_after or 0) == driver.turns - start:
                driver.engine.abort(job.request.id, index=job.abort_index)
        if not waiting and not driver.engine.unfinished:
            break
        driver.turn()
    else:
        raise AssertionError("it never ends")
    driver.finish()
    return streams
