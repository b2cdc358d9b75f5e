# SPDX-License-Identifier: Apache-2.0
"""Rows are reused: whatever a request left in its row, the next request's result is bitwise unaffected."""

from functools import cache
from typing import Any

import pytest

from jaxserve.types.request import Request
from jaxserve.types.sampling_params import SamplingParams
from tests.engine.driver import VOCABULARY, Driver, Streams

PROMPT = [11, 42, 7, 42, 88, 5, 11, 60, 23, 9]
OTHER = [71, 3, 90, 42, 17, 64]
THIRD = list(range(0, VOCABULARY, 3))
PLAIN: dict[str, Any] = dict(seed=1, temperature=1.2, max_tokens=10)

FEATURES: dict[str, dict[str, Any]] = {
    "bias": dict(logit_bias=dict.fromkeys(THIRD, -100.0)),
    "allowed": dict(allowed_token_ids=[1, 2, 50, 51, 97]),
    "repetition": dict(repetition_penalty=1.9),
    "frequency": dict(frequency_penalty=-2.0),
    "presence": dict(presence_penalty=-2.0),
    "bad words": dict(),
    "min tokens": dict(min_tokens=9, stop_token_ids=THIRD),
    "stop ids": dict(stop_token_ids=[STOP := 30]),
    "greedy": dict(temperature=0.0),
    "seed": dict(seed=12345),
    "temperature": dict(temperature=0.2),
    "top k": dict(top_k=2),
    "top p": dict(top_p=0.2),
    "min p": dict(min_p=0.9),
    "logprobs": dict(logprobs=5),
    "prompt logprobs": dict(prompt_logprobs=3),
    "n": dict(n=3),
}

# Who comes next asks for none of that; each takes three rows, so that whatever row it was is among them.
NEXT: dict[str, dict[str, Any]] = {
    "plain": dict(n=3),
    "scored": dict(n=3, logprobs=4, prompt_logprobs=2),
    "masked": dict(n=3, logit_bias={1: 0.5}, logprobs=1),
    "penalized": dict(n=3, presence_penalty=0.7, top_k=20),
}


def tenant(feature: str) -> Request:
    return Request(
        id=feature,
        prompt_token_ids=PROMPT,
        params=SamplingParams(**PLAIN | FEATURES[feature]),
        bad_word_ids=tuple((token,) for token in THIRD) if feature == "bad words" else (),
    )


def following(kind: str) -> Request:
    given: dict[str, Any] = dict(seed=9, temperature=1.1, max_tokens=8)
    return Request(id=kind, prompt_token_ids=OTHER, params=SamplingParams(**given | NEXT[kind]))


def new() -> Driver:
    return Driver(enable_prefix_caching=False, eos=False)


@cache
def first(name: str) -> Streams:
    """The results of an engine that has served no other request."""
    return new().finish(tenant(name) if name in FEATURES else following(name))


@pytest.fixture(scope="module")
def used() -> Driver:
    """One engine for all tests here, in which more and more could be stale."""
    return new()


def check_next(driver: Driver) -> None:
    for kind in NEXT:
        assert driver.finish(following(kind)) == first(kind), kind


@pytest.mark.parametrize("feature", FEATURES)
def test_after_its_end_and_before_it(used: Driver, feature: str) -> None:
    assert used.finish(tenant(feature)) == first(feature)
    check_next(used)
    assert used.finish(tenant(feature)) == first(feature)


@pytest.mark.parametrize("feature", FEATURES)
def test_after_an_abort(used: Driver, feature: str) -> None:
    used.add(tenant(feature))
    for _ in range(4):
        used.turn()
    assert used.scheduler.running
    used.engine.abort(feature)
    used.finish()
    check_next(used)


@pytest.mark.parametrize("feature", FEATURES)
def test_after_a_preemption(used: Driver, feature: str) -> None:
    """Both if the preempted request returns, and if others take its row."""
    for comes_back in (True, False):
        older = Request(id="older", prompt_token_ids=PROMPT, params=SamplingParams(temperature=0, max_tokens=20))
        before = used.scheduler.preemptions
        used.add(older)
        used.turn()
        used.add(tenant(feature))
        used.turn()
        used.hold(used.scheduler.pool.available)
        while used.scheduler.preemptions == before:
            used.turn()
        if not comes_back:
            used.engine.abort(feature)
            used.engine.abort("older")
        used.let_go()
        reported = used.finish()
        if comes_back:
            reported.pop(("older", 0))
            assert {name: s.tokens for name, s in reported.items()} == {n: s.tokens for n, s in first(feature).items()}
        check_next(used)


def test_features_show() -> None:
    """Each feature, if left behind, would change a result."""
    plain = new().finish(Request(id="plain", prompt_token_ids=PROMPT, params=SamplingParams(**PLAIN)))["plain", 0]
    assert plain.tokens.index(STOP) == 8  # late enough to be preempted before it
    for feature in FEATURES:
        reported = first(feature)
        assert len(reported) > 1 or reported[feature, 0] != plain, feature
