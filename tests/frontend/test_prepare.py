# SPDX-License-Identifier: Apache-2.0
"""Prompts as programs pass them, and the errors for values that are not prompts. No engine runs."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from jaxserve.engine.capacity import Limits
from jaxserve.errors import RequestError
from jaxserve.frontend.prepare import Preparer
from jaxserve.types.sampling_params import BeamSearchParams

LIMITS = Limits(
    vocab_size=100,
    max_model_len=64,
    max_num_seqs=4,
    max_num_batched_tokens=64,
    block_size=16,
    num_blocks=33,
    max_logprobs=20,
)
BEAMS = BeamSearchParams(beam_width=2, max_tokens=4)


@pytest.mark.parametrize("given", [[5, 6], (5, 6), np.array([5, 6]), {"prompt_token_ids": [5, 6]}], ids=repr)
def test_one_prompt(given: Any) -> None:
    preparer = Preparer(None, LIMITS, defaults={})
    assert list(preparer.prepare(given).prompt_token_ids) == [5, 6]
    request = preparer.prepare_beams(given, BEAMS)
    assert list(request.prompt_token_ids) == [5, 6] and request.beam_search == BEAMS


@pytest.mark.parametrize("given", [["a", "b"], [[5], [6]], [{"prompt_token_ids": [5]}], [None]], ids=repr)
def test_a_list_of_prompts_is_not_one_prompt(given: Any) -> None:
    preparer = Preparer(None, LIMITS, defaults={})
    for prepare in (preparer.prepare, lambda prompt: preparer.prepare_beams(prompt, BEAMS)):
        with pytest.raises(RequestError, match="a list of prompts was passed as one prompt; pass a string") as error:
            prepare(given)
        assert error.value.field == "prompt"


@pytest.mark.parametrize("given", [[], (), np.array([], np.int64)], ids=repr)
def test_an_empty_prompt(given: Any) -> None:
    with pytest.raises(RequestError, match="the prompt is empty"):
        Preparer(None, LIMITS, defaults={}).prepare(given)


def test_beams_wider_than_the_engine_allows() -> None:
    preparer = Preparer(None, LIMITS, defaults={})
    with pytest.raises(RequestError, match="beam_width is 5, but the engine runs at most 4"):
        preparer.prepare_beams([5], replace(BEAMS, beam_width=5))
    with pytest.raises(RequestError, match="twice as many log probabilities exceed max_logprobs 20"):
        preparer.prepare_beams([5], replace(BEAMS, beam_width=11))


def test_a_value_of_a_request_leaves_the_models_other_defaults() -> None:
    """Greedy sampling has no top_p; a request that sets a temperature samples with the model's."""
    preparer = Preparer(None, LIMITS, defaults={"temperature": 0, "top_p": 0.5, "max_tokens": 7})
    assert preparer.default_params().top_p == 1
    params = preparer.params({"temperature": 0.75})
    assert (params.temperature, params.top_p, params.max_tokens) == (0.75, 0.5, 7)
