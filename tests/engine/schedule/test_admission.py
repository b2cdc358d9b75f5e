# SPDX-License-Identifier: Apache-2.0
"""Rejected requests: errors name field, value and range; nothing is kept, and no other request is affected."""

from typing import Any, cast

import numpy as np
import pytest

from jaxserve.engine.capacity import Limits
from jaxserve.engine.schedule import admission
from jaxserve.errors import RequestError
from jaxserve.types.request import Request
from jaxserve.types.sampling_params import BAD_WORD_TOKENS, MAX_BAD_WORDS, SamplingParams
from tests.engine.fake_oracle import Oracle
from tests.engine.fakes import FakeEngine

LIMITS = Limits(
    vocab_size=50,
    max_model_len=20,
    max_num_seqs=4,
    max_num_batched_tokens=16,
    block_size=4,
    num_blocks=21,
    max_logprobs=5,
)

BAD: list[tuple[dict[str, Any], dict[str, Any], str, str]] = [
    # of the request, of its parameters, the field to change, what is said
    (dict(prompt_token_ids=[]), {}, "prompt", "the prompt is empty"),
    (dict(prompt_token_ids=None), {}, "prompt", "prompt is None, expected a list of token ids"),
    (dict(prompt_token_ids=7), {}, "prompt", "prompt is 7, expected a list"),
    (dict(prompt_token_ids="hello"), {}, "prompt", "prompt is 'hello', expected a list of token ids"),
    (dict(prompt_token_ids=b"\x01\x02"), {}, "prompt", "expected a list of token ids"),
    (dict(prompt_token_ids={1: 2}), {}, "prompt", "expected a list of token ids"),
    (dict(prompt_token_ids=[[]]), {}, "prompt", r"prompt contains \[\]"),
    (dict(prompt_token_ids=[[5], [6]]), {}, "prompt", r"prompt contains \[5\]"),
    (dict(prompt_token_ids=np.array([[1, 2], [3, 4]])), {}, "prompt", "prompt contains array"),
    (dict(prompt_token_ids=[-1, 5]), {}, "prompt", "prompt contains token id -1, but valid ids are 0 to 49"),
    (dict(prompt_token_ids=[5, 50]), {}, "prompt", "token id 50, but valid ids are 0 to 49"),
    (dict(prompt_token_ids=[999999999]), {}, "prompt", "token id 999999999, but valid ids are 0 to 49"),
    (dict(prompt_token_ids=[2**63]), {}, "prompt", f"token id {2**63}, but valid ids are 0 to 49"),
    (dict(prompt_token_ids=[10**5000]), {}, "prompt", "token id a number of more than 128 bits"),
    (dict(prompt_token_ids=np.array([3, 50], np.uint16)), {}, "prompt", "token id 50"),
    (dict(prompt_token_ids=[1, True]), {}, "prompt", "prompt contains True"),
    (dict(prompt_token_ids=[1, 2.0]), {}, "prompt", "prompt contains 2.0"),
    (dict(prompt_token_ids=[1, float("nan")]), {}, "prompt", "prompt contains nan"),
    (dict(prompt_token_ids=[1, None]), {}, "prompt", "prompt contains None"),
    (dict(prompt_token_ids=["1"]), {}, "prompt", "prompt contains '1'"),
    (dict(prompt_token_ids=[1] * 20), {}, "prompt", "has 20 tokens, but at most 19 can be continued"),
    (dict(prompt_token_ids=[1] * 21, score_only=True), {}, "prompt", "at most 20 can be scored"),
    (dict(prompt_token_ids=[1] * 21, embed=True), {}, "prompt", "at most 20 can be embedded"),
    *(
        (
            dict(embed=True),
            {name: value},
            name,
            f"{name} is .*, but an embedding generates nothing; remove it",
        )
        for name, value in dict(
            n=2,
            logprobs=0,
            prompt_logprobs=1,
            min_tokens=1,
            stop="x",
            stop_token_ids=[1],
            bad_words=["x"],
            logit_bias={1: 1},
            allowed_token_ids=[1],
            presence_penalty=1,
            frequency_penalty=1,
        ).items()
    ),
    (dict(embed=True, score_only=True), {}, "embed", "embed and score_only are both set"),
    (dict(embed=True, pool="max"), {}, "pool", "pool is 'max', expected one of last, first, mean, weighted_mean"),
    (dict(pool="mean"), {}, "pool", "pool is 'mean', but embed is not set; set embed"),
    (dict(prompt_token_ids=range(10**9)), {}, "prompt", "has 1000000000 tokens"),
    (
        {},
        dict(n=5, temperature=1),
        "n",
        "n is 5, but the engine runs at most 4 sequences at once; lower it to 4 or less",
    ),
    ({}, dict(stop_token_ids=[50]), "stop_token_ids", "stop_token_ids contains token id 50, but valid ids are 0 to 49"),
    ({}, dict(stop_token_ids=[999999], min_tokens=2), "stop_token_ids", "token id 999999"),
    ({}, dict(allowed_token_ids=[0, 50]), "allowed_token_ids", "allowed_token_ids contains token id 50"),
    (
        {},
        dict(logit_bias={191222: -100}),
        "logit_bias",
        "logit_bias contains token id 191222, but valid ids are 0 to 49",
    ),
    (dict(bad_word_ids=((1, 50),)), {}, "bad_words", "bad_words contains token id 50"),
    (dict(bad_word_ids=((-1,),)), {}, "bad_words", "bad_words contains token id -1"),
    (dict(bad_word_ids=((),)), {}, "bad_words", "a sequence of 0 tokens; use sequences of 1 to 32"),
    (dict(bad_word_ids=((1,) * (BAD_WORD_TOKENS + 1),)), {}, "bad_words", "a sequence of 33 tokens"),
    (
        dict(bad_word_ids=((1,),) * (MAX_BAD_WORDS + 1)),
        {},
        "bad_words",
        "expands to 129 token sequences; .* at most 128",
    ),
    ({}, dict(logprobs=6), "logprobs", "logprobs is 6, above the engine's max_logprobs 5; ask for at most 5"),
    ({}, dict(logprobs=-1), "logprobs", r"logprobs is -1 \(all 50\), above the engine's max_logprobs 5"),
    ({}, dict(prompt_logprobs=6), "prompt_logprobs", "prompt_logprobs is 6"),
    ({}, dict(min_tokens=18, max_tokens=None), "min_tokens", "min_tokens is 18, .* room for only 17"),
    ({}, dict(min_tokens=10**9, max_tokens=None), "min_tokens", "min_tokens is 1000000000"),
    (
        {},
        dict(allowed_token_ids=[7], stop_token_ids=[7], min_tokens=2),
        "min_tokens",
        "every allowed token ends the text",
    ),
    (dict(cache_salt=""), {}, "cache_salt", "cache_salt is '', expected a string of 1 to 128 characters"),
    (dict(cache_salt="x" * 129), {}, "cache_salt", "expected a string of 1 to 128 characters"),
    (dict(cache_salt=5), {}, "cache_salt", "cache_salt is 5, expected a string"),
    (dict(priority=1.5), {}, "priority", "priority is 1.5, expected a whole number of at most 64 bits"),
    (dict(priority=2**63), {}, "priority", f"priority is {2**63}, expected"),
    (dict(priority=True), {}, "priority", "priority is True, expected"),
    (dict(deadline=float("nan")), {}, "deadline", "deadline is nan, expected a time"),
    (dict(deadline="soon"), {}, "deadline", "deadline is 'soon', expected a time"),
    (dict(id=["a"]), {}, "request_id", r"request_id is \['a'\], expected a string"),
]


def made(changes: dict[str, Any], params: dict[str, Any]) -> Request:
    fields: dict[str, Any] = dict(id="a", prompt_token_ids=[1, 2, 3]) | changes
    return Request(**fields, params=SamplingParams(**params))


@pytest.mark.parametrize(("changes", "params", "field", "said"), BAD)
def test_bad_requests_are_rejected_with_the_name_of_the_field(
    changes: dict[str, Any], params: dict[str, Any], field: str, said: str
) -> None:
    request = made(changes, params)
    with pytest.raises(RequestError, match=said) as refused:
        admission.check(request, LIMITS)
    assert refused.value.field == field and refused.value.status == 400
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 400


def test_rejected_requests_leave_nothing_and_do_not_affect_others() -> None:
    engine = FakeEngine(LIMITS)
    canary = Request(
        id="canary", prompt_token_ids=[4, 5, 6], params=SamplingParams(temperature=1, seed=5, max_tokens=12)
    )
    engine.add(canary)
    for changes, params, _, _ in BAD:
        engine.turn()
        before = vars(engine.scheduler).copy()
        with pytest.raises(RequestError):
            engine.scheduler.add(made(changes, params))
        assert vars(engine.scheduler) == before and engine.scheduler.queued == 0
        engine.check()
    engine.drain()
    engine.check_over()
    assert engine.answers["canary", 0].tokens == Oracle(LIMITS).answer(canary, 0).tokens


@pytest.mark.parametrize(
    ("changes", "params"),
    [
        (dict(prompt_token_ids=[0, 49]), {}),
        (dict(prompt_token_ids=(1,)), {}),
        (dict(prompt_token_ids=range(10)), {}),
        (dict(prompt_token_ids=np.arange(19, dtype=np.int64)), {}),
        (dict(prompt_token_ids=[np.int32(3), 4]), {}),
        (dict(prompt_token_ids=[1] * 20, score_only=True), dict(prompt_logprobs=5)),
        (dict(prompt_token_ids=[1] * 20, embed=True), dict(temperature=0.5, top_p=0.5, repetition_penalty=1.5)),
        ({}, dict(n=4, temperature=1, logprobs=5, min_tokens=17, max_tokens=17)),
        ({}, dict(stop_token_ids=[0, 49], allowed_token_ids=[49], logit_bias={"0": 1, 49: -1})),
        (dict(bad_word_ids=((49,) * BAD_WORD_TOKENS,) * MAX_BAD_WORDS), {}),
        (dict(cache_salt="x" * 128, priority=-(2**63), deadline=0), {}),
    ],
)
def test_values_at_the_limits_are_accepted(changes: dict[str, Any], params: dict[str, Any]) -> None:
    engine = FakeEngine(LIMITS)
    engine.scheduler.add(made(changes, params))
    for sequence in engine.sequences():
        assert all(type(token) is int for token in cast("list[object]", sequence.tokens))


def test_all_logprobs_are_accepted_if_the_engine_allows_them() -> None:
    limits = Limits(**{**vars(LIMITS), "max_logprobs": -1})
    admission.check(made({}, dict(logprobs=-1, prompt_logprobs=50)), limits)
    with pytest.raises(RequestError, match="logprobs is 51, above the engine's max_logprobs 50"):
        admission.check(made({}, dict(logprobs=51)), limits)
