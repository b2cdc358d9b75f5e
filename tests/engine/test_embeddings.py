# SPDX-License-Identifier: Apache-2.0
"""Embeddings equal a dense forward pass for the last token, with chunks, cached prefixes and other requests."""

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.models import decoder
from jaxserve.models.attention import Dense
from jaxserve.models.decoder import Params
from jaxserve.types.request import Request
from jaxserve.types.sampling_params import SamplingParams
from tests.engine.driver import BLOCK, FULL, LONGEST, Driver, Stream, alone, params_of
from tests.engine.test_sampling_end_to_end import BAD, poisoned

PROMPT = [(7 * i + 3) % 97 for i in range(LONGEST)]  # as long as the model takes


@jax.jit
def _dense(params: Params, tokens: jax.Array) -> jax.Array:
    body, head = decoder.bind(decoder.Body, FULL, params), decoder.bind(decoder.Head, FULL, params)
    positions = jnp.arange(LONGEST, dtype=jnp.int32)[None]
    x = body(tokens, positions, Dense())
    return head.final(x)


@cache
def dense(length: int) -> np.ndarray:
    return np.asarray(_dense(params_of(FULL), jnp.asarray([PROMPT], jnp.int32)))[0, length - 1]


def embed(name: str, length: int, **more: Any) -> Request:
    return Request(id=name, prompt_token_ids=PROMPT[:length], embed=True, **more)


def check(stream: Stream, length: int) -> None:
    assert (stream.finish_reason, stream.tokens, stream.error) == ("stop", [], None)
    found = np.frombuffer(stream.embedding or b"", np.float32)
    np.testing.assert_allclose(found, dense(length), rtol=1e-5, atol=1e-4)


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
    again = [embed(f"again {i}", LONGEST) for i in range(3)]
    streams = driver.finish(*again)
    for name, stream in wanted.items():
        assert streams[name].tokens == stream.tokens and streams[name].finish_reason == stream.finish_reason
        assert [entry.token for entry in streams[name].prompt_logprobs] == [e.token for e in stream.prompt_logprobs]
    for length in (30, LONGEST, 9, 40):
        check(streams[f"{length}", 0], length)
    for request in again:
        check(streams[request.id, 0], LONGEST)
    assert driver.scheduler.preemptions


def test_a_preempted_one_is_computed_again() -> None:
    driver = Driver(budget=4, spare=11)
    writer = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)
    for i in range(2):  # they grow while it is computed by two tokens in a step
        driver.add(Request(id=f"before {i}", prompt_token_ids=[5 + i] * 15, params=writer))
    driver.add(embed("last", 40))
    while not driver.scheduler.preemptions:
        driver.turn()
    assert driver.streams["last", 0].finish_reason is None
    check(driver.finish()["last", 0], 40)


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
    streams = driver.finish(sick, embed("sound", 3))
    assert BAD not in PROMPT[:3]
    assert (streams["sick", 0].finish_reason, streams["sick", 0].embedding) == ("error", None)
    check(streams["sound", 0], 3)
    assert driver.finish(sick)["sick", 0].finish_reason == "error"
