# SPDX-License-Identifier: Apache-2.0
"""Needs: what a request requires of the head, and that the cheapest program which has it all is chosen."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.engine.schedule import need
from jaxserve.engine.schedule.need import CONTROLS, FILTER, LOGPROB, MASK, RANDOM
from jaxserve.engine.schedule.sequence import sampling_need
from jaxserve.types.request import Request
from jaxserve.types.sampling_params import SamplingParams


def cheapest(heads: dict[int, need.Variant], asked: int) -> need.Variant:
    return next(head for covered, head in heads.items() if not asked & ~covered)


GREEDY: dict[str, Any] = dict(temperature=0)


@pytest.mark.parametrize(
    ("params", "shown"),
    [
        (GREEDY, "greedy"),
        ({}, "random"),
        (dict(top_k=5), "filtered"),
        (dict(min_p=0.1), "filtered"),
        (GREEDY | dict(repetition_penalty=1.1), "filtered+controls"),
        (dict(top_p=0.9, repetition_penalty=1.05), "filtered+controls"),
        (dict(logit_bias={1: 2}), "filtered+controls"),
        (dict(min_tokens=1), "filtered+controls"),
        (dict(logprobs=0), "filtered+top0"),
        (GREEDY | dict(logprobs=1), "filtered+top5"),
        (dict(logprobs=5), "filtered+top5"),
        (dict(logprobs=6), "filtered+controls+mask+top20"),
        (dict(logprobs=-1), "filtered+controls+mask+top20"),
        (dict(logprobs=0, presence_penalty=1), "filtered+controls+mask+top20"),
        (dict(allowed_token_ids=[1]), "filtered+controls+mask+top20"),
    ],
    ids=repr,
)
def test_the_cheapest_head_with_all_that_is_asked(params: dict[str, Any], shown: str) -> None:
    heads = need.variants(20)
    asked = sampling_need(Request(id="a", prompt_token_ids=[1], params=SamplingParams(**params)))
    assert repr(cheapest(heads, asked)) == shown


FLAGS = st.sampled_from([0, RANDOM, FILTER, CONTROLS, MASK, *map(need.of_logprobs, (None, 0, 1, 5, 6, 20, -1))])


@given(asked=st.lists(FLAGS, max_size=6), most=st.integers(0, 30))
def test_a_step_has_what_each_of_its_rows_needs(asked: list[int], most: int) -> None:
    heads = need.variants(most)
    together = 0
    for each in asked:
        together |= each
    if not most:
        together &= FILTER | CONTROLS | MASK | LOGPROB  # more is refused at admission
    head = cheapest(heads, together)
    for each in asked:
        assert not each & RANDOM or head.mode != "greedy"
        assert each & FILTER != FILTER or head.mode == "filtered"
        assert (head.controls or not each & CONTROLS) and (head.mask or not each & MASK)
        assert head.top_n is not None or not each & LOGPROB
    for wanted in (0, 1, 5, 6, 20, -1):
        if wanted <= most and need.of_logprobs(wanted) in asked:
            assert head.top_n is not None and head.top_n >= (most if wanted < 0 else wanted)


@given(most=st.integers(0, 200))
def test_heads_are_few_and_the_last_one_has_it_all(most: int) -> None:
    heads = list(need.variants(most).values())
    assert len(heads) <= 7 and heads[-1] == need.Variant("filtered", True, True, most)
    assert all(head.top_n is None or head.top_n <= most for head in heads)
