# SPDX-License-Identifier: Apache-2.0
"""The whole engine against numpy: tokens, log probabilities and frequencies from the model's logits alone."""

from collections import Counter
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.models.decoder import Params
from jaxserve.types.request import Request
from jaxserve.types.sampling_params import SamplingParams
from tests.engine.driver import BLOCK, EOS, FULL, VOCABULARY, Driver, Stream, alone, logits_of, params_of
from tests.engine.model_oracle import Step, check_logprobs, log_softmax
from tests.engine.workloads import random_jobs, run


def check(request: Request, index: int, stream: Stream, *, processed: bool = False) -> int:
    """Check every token and number of a sample; return how many of its tokens could be predicted with certainty."""
    prompt, params = list(request.prompt_token_ids), request.params
    logits = logits_of([*prompt, *stream.tokens])
    certain = 0
    for i, token in enumerate(stream.tokens):
        step = Step(request, index, stream.tokens[:i], logits[len(prompt) + i - 1])
        possible = step.possible()
        assert token in possible, f"{request.id}.{index}: token {i} is {token}, right is {possible}"
        certain += len(possible) == 1
        if params.logprobs is not None:
            row = step.processed() if processed else step.logits
            check_logprobs(stream.logprobs[i], row, token, params.logprobs)
    assert len(stream.logprobs) == (len(stream.tokens) if params.logprobs is not None else 0)
    if params.prompt_logprobs is not None and index == 0:
        if stream.finish_reason != "abort":
            assert len(stream.prompt_logprobs) == len(prompt) - 1
        for i, reported in enumerate(stream.prompt_logprobs, start=1):
            check_logprobs(reported, logits[i - 1], prompt[i], params.prompt_logprobs)
    else:
        assert not stream.prompt_logprobs
    check_end(request, stream)
    return certain


def check_end(request: Request, stream: Stream) -> None:
    params, tokens = request.params, stream.tokens
    stops = {*(params.stop_token_ids or ()), *(() if params.ignore_eos else (EOS,))}
    limit = min(params.max_tokens or FULL.max_positions, FULL.max_positions - len(request.prompt_token_ids))
    early = [i for i, token in enumerate(tokens) if token in stops and i + 1 >= params.min_tokens]
    if request.score_only:
        assert stream.finish_reason == "length" and not tokens
    elif request.embed:
        assert stream.finish_reason in ("stop", "abort") and not tokens
    elif stream.finish_reason == "stop":
        assert early == [len(tokens) - 1]
        assert stream.stop_reason == (None if tokens[-1] == EOS and not params.ignore_eos else tokens[-1])
    else:
        assert not early and stream.stop_reason is None
        assert stream.finish_reason == "abort" or len(tokens) == limit


def test_every_token_is_predicted() -> None:
    tokens = certain = 0
    for seed in range(200, 208):
        jobs = random_jobs(seed, count=10)
        streams = run(Driver(budget=12), jobs)
        for job in jobs:
            for index in range(job.request.params.n):
                stream = streams[job.request.id, index]
                tokens += len(stream.tokens)
                certain += check(job.request, index, stream)
    assert tokens > 500 and certain > 0.99 * tokens


def test_processed_logprobs() -> None:
    """Log probabilities of the distribution that is sampled from; those of a prompt are still the model's."""
    jobs = random_jobs(300, count=8, always={"logprobs": 5, "n": 1, "prompt_logprobs": 2})
    requests = [job.request for job in jobs if job.request.generates]
    assert sum(bool(r.params.top_k) for r in requests) and sum(r.params.penalized for r in requests)
    streams = alone(Driver(logprobs_mode="processed_logprobs"), requests)
    for request in requests:
        check(request, 0, streams[request.id, 0], processed=True)


@pytest.mark.parametrize(
    "params",
    [
        dict(temperature=1.3),
        dict(temperature=0.8, top_k=12),
        dict(top_p=0.7),
        dict(temperature=1.7, min_p=0.3, top_k=9),
    ],
    ids=lambda params: " ".join(params),
)
def test_frequencies(params: dict[str, Any]) -> None:
    """Frequencies over many samples, each with its own seed. The seeds are fixed, so a correct engine always passes."""
    from scipy import stats  # a second, of every process that collects tests

    prompt, count = [17, 5, 60], 300
    driver = Driver()
    requests = [
        Request(id=str(i), prompt_token_ids=prompt, params=SamplingParams(n=4, max_tokens=1, seed=10 * i, **params))
        for i in range(count)
    ]
    drawn = Counter(stream.tokens[0] for stream in driver.finish(*requests).values())
    weights = np.exp(log_softmax(Step(requests[0], 0, [], logits_of(prompt)[-1]).processed()))
    observed, expected = np.array([drawn[token] for token in range(VOCABULARY)]), 4 * count * weights
    assert not observed[expected == 0].any()
    common = expected >= 5  # chi-square wants five in each cell; the rest is one cell
    cells = [observed[common], expected[common]]
    if (rest := expected[~common].sum()) > 0:
        cells = [np.append(cells[0], observed[~common].sum()), np.append(cells[1], rest)]
    assert cells[0].size > 3 and stats.chisquare(cells[0], cells[1]).pvalue > 1e-3


# --- logits that are no numbers -------------------------------------------------------------------------------------

BAD = 33


def poisoned() -> Params:
    """One token's embedding is NaN."""
    params = params_of(FULL)
    weight = params["embed"]["weight"].at[BAD].set(jnp.nan)
    return {**params, "embed": {**params["embed"], "weight": weight}}


def others() -> list[Request]:
    kinds: list[dict[str, Any]] = [
        dict(temperature=0.0, logprobs=3),
        dict(seed=4, presence_penalty=0.5),
        dict(top_k=8, seed=5),
    ]
    return [
        Request(
            id=f"sound {i}",
            prompt_token_ids=list(range(40 + i, 60 + i)),
            params=SamplingParams(max_tokens=14, logit_bias={BAD: -100.0}, **kind),
        )
        for i, kind in enumerate(kinds)
    ]


@pytest.mark.parametrize("overlap", [True, False])
def test_a_row_that_is_not_finite_ends_alone(overlap: bool) -> None:
    """The other rows are bitwise the same as beside a sound request that leaves at the same time."""
    prompt = [*range(1, 1 + BLOCK), BAD, *range(20, 20 + BLOCK)]
    sick = Request(id="sick", prompt_token_ids=prompt, params=SamplingParams(temperature=0, max_tokens=1 + overlap))
    results = []
    for params in (params_of(FULL), poisoned()):
        driver = Driver(params=params, async_scheduling=overlap)
        driver.add(sick)
        results.append(driver.finish(*others()))
    sound, poisoned_too = results
    ended = poisoned_too.pop(("sick", 0))
    del sound["sick", 0]
    assert ended.finish_reason == "error" and not ended.tokens and "not finite" in (ended.error or "")
    assert poisoned_too == sound


def test_nothing_that_is_not_finite_is_cached_or_left_behind() -> None:
    """Its blocks are not reused for the same prompt; the next owners read nothing of it."""
    prompt = [*range(1, 1 + 2 * BLOCK), BAD, *range(20, 20 + BLOCK)]
    driver = Driver(params=poisoned(), spare=FULL.max_positions // BLOCK)
    for name in ("first", "again"):
        reported = driver.finish(Request(id=name, prompt_token_ids=prompt, params=SamplingParams(n=2, seed=1)))
        assert [(s.finish_reason, s.tokens, s.cached) for s in reported.values()] == [("error", [], 0)] * 2
        assert driver.scheduler.pool.counts()[1] == 0
    assert np.isnan(np.asarray(driver.runner.cache[1]["k"])).any()
    for request in others():
        assert driver.finish(request) == Driver(params=poisoned()).finish(request)
