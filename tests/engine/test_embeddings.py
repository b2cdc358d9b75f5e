# SPDX-License-Identifier: Apache-2.0
"""Hidden states equal those of a dense forward pass, with chunks, cached prefixes and other requests."""

from dataclasses import replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.models import decoder
from jaxserve.models.attention import Dense
from jaxserve.models.decoder import Params
from jaxserve.types.request import Pool, Request
from jaxserve.types.sampling_params import SamplingParams
from tests.engine.driver import BLOCK, FULL, LONGEST, TOKENS, Driver, Stream, alone, params_of
from tests.engine.test_sampling_end_to_end import BAD, poisoned

PROMPT = [(7 * i + 3) % 97 for i in range(LONGEST)]  # as long as the model takes


@jax.jit
def _dense(params: Params, tokens: jax.Array) -> jax.Array:
    body, head = decoder.bind(decoder.Body, FULL, params), decoder.bind(decoder.Head, FULL, params)
    positions = jnp.arange(LONGEST, dtype=jnp.int32)[None]
    x = body(tokens, positions, Dense())
    return head.final(x)


@cache
def dense(length: int, pool: Pool = "last") -> np.ndarray:
    states = np.asarray(_dense(params_of(FULL), jnp.asarray([PROMPT], jnp.int32)))[0, :length]
    weights = np.arange(length) + 1.0
    match pool:
        case "last":
            return states[-1]
        case "first":
            return states[0]
        case "mean":
            return np.average(states, axis=0)
        case "weighted_mean":
            return np.average(states, axis=0, weights=weights)


def embed(name: str, length: int, **more: Any) -> Request:
    return Request(id=name, prompt_token_ids=PROMPT[:length], embed=True, **more)


def check(stream: Stream, length: int, pool: Pool = "last") -> None:
    assert (stream.finish_reason, stream.tokens, stream.error) == ("stop", [], None)
    found = np.frombuffer(stream.embedding or b"", np.float32)
    np.testing.assert_allclose(found, dense(length, pool), rtol=1e-5, atol=1e-4)


LENGTHS = (1, 2, 7, BLOCK, BLOCK + 1, 31, LONGEST)


@pytest.mark.parametrize(
    "options",
    [dict(), dict(async_scheduling=False), dict(budget=5), dict(budget=4, enable_prefix_caching=False)],
    ids=["whole", "one step at a time", "chunks", "nothing shared"],
)
def test_every_length_whole_chunked_and_cached(options: dict[str, Any]) -> None:
    driver = Driver(**options)
    for _ in range(2):  # the second time most of it is cached
        streams = driver.finish(*(embed(f"{length}", length) for length in LENGTHS))
        for length in LENGTHS:
            check(streams[f"{length}", 0], length)
    shared = options.get("enable_prefix_caching", True)
    assert streams[f"{LONGEST}", 0].cached == (LONGEST - BLOCK if shared else 0)
    assert driver.engine.metrics().finished == dict(stop=2 * len(LENGTHS), length=0, abort=0, error=0)


@pytest.mark.parametrize("pool", ["first", "mean", "weighted_mean"])
@pytest.mark.parametrize("options", [dict(), dict(async_scheduling=False, budget=5)], ids=["whole", "chunks"])
def test_other_pools(pool: Pool, options: dict[str, Any]) -> None:
    driver = Driver(**options)
    driver.finish(embed("to cache it", LONGEST))  # a mean needs the hidden states of all tokens, cached or not
    streams = driver.finish(*(embed(f"{length}", length, pool=pool) for length in LENGTHS))
    for length in LENGTHS:
        check(streams[f"{length}", 0], length, pool)
        assert streams[f"{length}", 0].cached == 0
    assert driver.finish(embed("again", LONGEST))["again", 0].cached == LONGEST - BLOCK


def test_only_the_first_token_is_computed_for_it() -> None:
    driver = Driver()
    driver.finish(embed("first", LONGEST, pool="first"))
    assert driver.engine.metrics().computed_tokens == 1
    driver.finish(embed("mean", LONGEST, pool="mean"))
    assert driver.engine.metrics().computed_tokens == 1 + LONGEST


def test_a_mean_does_not_depend_on_chunks() -> None:
    """Where hidden states are the same to the bit, which those of a program of one shape are."""
    found = set[bytes]()
    for budget in (TOKENS, 20, 17):
        driver = Driver(budget=budget, enable_prefix_caching=False)
        driver.scheduler.limits = replace(driver.scheduler.limits, max_num_batched_tokens=budget)
        stream = driver.finish(embed("mean", 60, pool="mean"))["mean", 0]
        assert stream.embedding is not None
        found.add(stream.embedding)
    assert len(found) == 1


def neighbours() -> list[Request]:
    kinds: list[dict[str, Any]] = [
        dict(temperature=0, logprobs=2),
        dict(n=2, seed=4, presence_penalty=0.5),
        dict(temperature=0, prompt_logprobs=1),
    ]
    return [
        Request(id=f"beside {i}", prompt_token_ids=PROMPT[i : i + 20], params=SamplingParams(max_tokens=30, **kind))
        for i, kind in enumerate(kinds)
    ]


def test_other_requests_are_not_affected() -> None:
    """Memory for little more than one request: the last ones are preempted and computed again."""
    wanted = alone(Driver(async_scheduling=False, enable_prefix_caching=False), neighbours())
    driver = Driver(spare=LONGEST // BLOCK + 1, budget=12)
    driver.add(*neighbours())
    for length in (30, LONGEST, 9, 40):
        driver.add(embed(f"{length}", length))
        driver.turn()
    pools: list[Pool] = ["mean", "last", "weighted_mean"]
    again = [embed(f"again {i}", LONGEST, pool=pool) for i, pool in enumerate(pools)]
    streams = driver.finish(*again)
    for name, stream in wanted.items():
        assert streams[name].tokens == stream.tokens and streams[name].finish_reason == stream.finish_reason
        assert [entry.token for entry in streams[name].prompt_logprobs] == [e.token for e in stream.prompt_logprobs]
    for length in (30, LONGEST, 9, 40):
        check(streams[f"{length}", 0], length)
    for request in again:
        check(streams[request.id, 0], LONGEST, request.pool)
    assert driver.scheduler.preemptions


@pytest.mark.parametrize("pool", ["last", "mean"])
def test_a_preempted_one_is_computed_again(pool: Pool) -> None:
    driver = Driver(budget=4, spare=11)
    writer = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)
    for i in range(2):  # they grow while it is computed by two tokens in a step
        driver.add(Request(id=f"before {i}", prompt_token_ids=[5 + i] * 15, params=writer))
    driver.add(embed("last", 40, pool=pool))
    while not driver.scheduler.preemptions:
        driver.turn()
    assert driver.streams["last", 0].finish_reason is None
    check(driver.finish()["last", 0], 40, pool)


def test_an_aborted_request_returns_no_embedding() -> None:
    driver = Driver(budget=5)
    driver.add(embed("a", 40), embed("b", 40))
    for _ in range(3):
        driver.turn()
    driver.engine.abort("a")
    streams = driver.finish()
    assert (streams["a", 0].finish_reason, streams["a", 0].embedding) == ("abort", None)
    check(streams["b", 0], 40)


def test_an_embedding_that_is_not_finite_fails_only_its_request() -> None:
    driver = Driver(params=poisoned())
    sick = Request(id="sick", prompt_token_ids=[1, 2, BAD], embed=True)
    early = Request(id="early", prompt_token_ids=[1, BAD, 2], embed=True, pool="mean")
    streams = driver.finish(sick, early, embed("sound", 3), embed("mean", 3, pool="mean"))
    assert BAD not in PROMPT[:3]
    assert (streams["early", 0].finish_reason, streams["early", 0].embedding) == ("error", None)
    check(streams["mean", 0], 3, "mean")
    assert (streams["sick", 0].finish_reason, streams["sick", 0].embedding) == ("error", None)
    check(streams["sound", 0], 3)
    assert driver.finish(sick)["sick", 0].finish_reason == "error"
