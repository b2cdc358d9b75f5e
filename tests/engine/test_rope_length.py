# SPDX-License-Identifier: Apache-2.0
"""Models whose rotary angles depend on the length: a request's tokens depend on its prompt and parameters alone."""

from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.models import decoder
from jaxserve.models.spec import Dynamic, LongRope, ModelSpec, Rope
from jaxserve.types.request import Request
from jaxserve.types.sampling_params import SamplingParams
from tests.engine.driver import FULL, LONGEST, Driver, params_of

ORIGINAL = 16
SCALINGS = {
    "dynamic": Dynamic(factor=4.0, original=ORIGINAL),
    "longrope": LongRope(short=(1.0,) * 4, long=(2.0, 3.0, 4.0, 5.0), original=ORIGINAL),
}


def scaled(scaling: Any) -> ModelSpec:
    rope = Rope(dim=8, base=10_000.0, scaling=scaling)
    return replace(
        FULL, layers=tuple(replace(layer, attention=replace(layer.attention, rope=rope)) for layer in FULL.layers)
    )


@pytest.mark.parametrize("name", SCALINGS)
def test_tokens_do_not_depend_on_max_tokens(name: str) -> None:
    """Short and long answers begin alike, with the angles for max_model_len; and each finds what the other cached."""
    spec = scaled(SCALINGS[name])
    driver, prompt = Driver(spec, max_num_seqs=1), [11, 42, 7, 42, 88, 5, 11, 60, 23, 9]
    answers: list[list[int]] = []
    for count in (2, LONGEST - len(prompt), 4):
        params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
        stream = driver.finish(Request(id="a", prompt_token_ids=prompt, params=params))["a", 0]
        assert len(stream.tokens) == count
        assert bool(stream.cached) == bool(answers), "a prefix is not shared across lengths"
        answers.append(stream.tokens)
    assert answers[0] == answers[1][:2] and answers[2] == answers[1][:4]

    text = [*prompt, *answers[1]]
    length = jnp.array([driver.engine.limits.rope_length], jnp.int32)
    logits = decoder.forward(spec, params_of(spec), jnp.asarray([text], jnp.int32), rope_lengths=length)
    expected = np.asarray(logits[0]).argmax(axis=1)[len(prompt) - 1 : -1].tolist()
    assert answers[1] == expected
