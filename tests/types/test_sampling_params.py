# SPDX-License-Identifier: Apache-2.0
"""Sampling parameters: defaults, ranges, normalisation, and the errors."""

import copy
import math
import pickle
from dataclasses import fields, replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.errors import RequestError
from jaxserve.types.sampling_params import BeamSearchParams, RequestOutputKind, SamplingParams

DEFAULTS = dict(
    n=1,
    presence_penalty=0.0,
    frequency_penalty=0.0,
    repetition_penalty=1.0,
    temperature=1.0,
    top_p=1.0,
    top_k=0,
    min_p=0.0,
    seed=None,
    stop=(),
    stop_token_ids=(),
    bad_words=(),
    ignore_eos=False,
    max_tokens=16,
    min_tokens=0,
    logprobs=None,
    prompt_logprobs=None,
    detokenize=True,
    skip_special_tokens=True,
    spaces_between_special_tokens=True,
    include_stop_str_in_output=False,
    output_kind=RequestOutputKind.CUMULATIVE,
    logit_bias=None,
    allowed_token_ids=None,
    skip_reading_prefix_cache=None,
)
REALS = ("presence_penalty", "frequency_penalty", "repetition_penalty", "temperature", "top_p", "min_p")
WHOLES = ("n", "top_k", "seed", "max_tokens", "min_tokens", "logprobs", "prompt_logprobs")
FLAGS = (
    *("ignore_eos", "detokenize", "skip_special_tokens", "spaces_between_special_tokens"),
    *("include_stop_str_in_output", "skip_reading_prefix_cache"),
)
TINY = math.ulp(0.0)

# field: (accepted at the edges, refused just outside)
RANGES: dict[str, tuple[tuple[Any, ...], tuple[Any, ...]]] = {
    "n": ((1, 16384), (0, -1, 16385)),
    "presence_penalty": ((-2, 2, 0.5), (math.nextafter(-2, -3), math.nextafter(2, 3))),
    "frequency_penalty": ((-2, 2, 0.5), (math.nextafter(-2, -3), math.nextafter(2, 3))),
    "repetition_penalty": ((TINY, 1, 1e300), (0, -0.0, -1, -TINY)),
    "temperature": ((0, 0.01, 2), (-TINY, math.nextafter(2, 3))),
    "top_p": ((TINY, 1), (0, -0.5, math.nextafter(1, 2))),
    "top_k": ((-1, 0, 1, 2**31 - 1), (-2, 2**31)),
    "min_p": ((0, 1), (-TINY, math.nextafter(1, 2))),
    "seed": ((0, -1, -(2**63), 2**63 - 1), (-(2**63) - 1, 2**63)),
    "max_tokens": ((1, 2**31 - 1, None), (0, -1, 2**31)),
    "min_tokens": ((0, 16), (-1, 17, 2**31)),
    "logprobs": ((0, -1, None, True), (-2, 2**31)),
    "prompt_logprobs": ((0, -1, None, True), (-2, 2**31)),
}


def given_as(**given: Any) -> SamplingParams:
    """What callers without a type checker may write."""
    return SamplingParams(**given)


def refused(field: str, **given: Any) -> RequestError:
    with pytest.raises(RequestError) as caught:
        SamplingParams(**given)
    assert caught.value.field == field
    assert field in caught.value.problem
    assert len(str(caught.value)) < 600 and str(caught.value).isprintable()
    return caught.value


def test_defaults() -> None:
    assert {f.name: getattr(SamplingParams(), f.name) for f in fields(SamplingParams)} == DEFAULTS


# --- numbers --------------------------------------------------------------------------------------------------------


def test_every_number_has_a_range_here() -> None:
    assert set(RANGES) == {*REALS, *WHOLES}


@pytest.mark.parametrize("name", RANGES)
def test_edges_of_the_ranges(name: str) -> None:
    inside, outside = RANGES[name]
    for value in inside:
        SamplingParams(**{name: value})
    for value in outside:
        refused(name, **{name: value})


@pytest.mark.parametrize("name", RANGES)
@pytest.mark.parametrize(
    "value",
    [math.nan, math.inf, -math.inf, float("1e400"), 10**400, 10**5000, -(10**5000), "1", b"1", [1], {}, 1j],
    ids=type,
)
def test_invalid_numbers(name: str, value: Any) -> None:
    refused(name, **{name: value})


@pytest.mark.parametrize("name", [*REALS, "n", "top_k", "seed", "max_tokens", "min_tokens"])
@pytest.mark.parametrize("value", [True, np.True_])
def test_booleans_are_not_numbers(name: str, value: Any) -> None:
    refused(name, **{name: value})


@pytest.mark.parametrize("name", WHOLES)
@pytest.mark.parametrize("value", [1.0, 1.5, np.float32(1), Fraction(1)])
def test_whole_numbers_cannot_be_floats(name: str, value: Any) -> None:
    refused(name, **{name: value})


def test_numbers_of_other_libraries_become_python_numbers() -> None:
    params = given_as(
        n=np.int64(2), top_k=np.int32(5), temperature=np.float32(0.5), min_p=0, logit_bias={np.int64(3): np.float64(1)}
    )
    assert [type(x) for x in (params.n, params.top_k, params.temperature, params.min_p)] == [int, int, float, float]
    assert params.logit_bias is not None
    assert [(type(k), type(v)) for k, v in params.logit_bias.items()] == [(int, float)]


@pytest.mark.parametrize(
    "name", [name for name in DEFAULTS if DEFAULTS[name] not in (None, ()) and name != "max_tokens"]
)
def test_parameters_with_a_default_cannot_be_none(name: str) -> None:
    refused(name, **{name: None})


@pytest.mark.parametrize("name", FLAGS)
@pytest.mark.parametrize("value", [1, 0, "true", 0.0, np.True_])
def test_flags_are_true_or_false(name: str, value: Any) -> None:
    refused(name, **{name: value})
    assert getattr(given_as(**{name: True}), name) is True
    assert getattr(given_as(**{name: False}), name) is False


def test_errors_name_value_and_range() -> None:
    text = str(refused("top_p", top_p=1.5))
    assert "1.5" in text and "above 0 and at most 1" in text
    text = str(refused("n", n=99999))
    assert "99999" in text and "from 1 to 16384" in text
    text = str(refused("temperature", temperature=-1))
    assert "-1" in text and "from 0 to 2" in text


def test_errors_about_huge_values_are_short() -> None:
    refused("stop_token_ids", stop_token_ids="x" * 10**6)
    refused("temperature", temperature="\x1b[31m\n" * 1000)


UNKNOWN = [
    ({"best_of": 2}, "best_of is not supported yet"),
    ({"guided_json": "{}"}, "known: n, presence_penalty"),
    ({"Temperature": 1}, "did you mean temperature?"),
    ({"top p": 1}, "did you mean top_p?"),
]


@pytest.mark.parametrize(("given", "reported"), UNKNOWN)
def test_unknown_fields_are_rejected(given: dict[str, Any], reported: str) -> None:
    [name] = given
    assert reported in str(refused(name, **given))


def test_positional_values_are_rejected() -> None:
    positional: Any = SamplingParams
    with pytest.raises(RequestError, match="by name"):
        positional(1, 0.5)


# --- what is normalised ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0, 0.0, -0.0, 1e-6, 9.9e-6])
def test_greedy_ignores_the_filters(temperature: float) -> None:
    params = SamplingParams(temperature=temperature, top_p=0.5, top_k=7, min_p=0.2, seed=4)
    assert params.greedy
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (0, 1, 0, 0)
    assert math.copysign(1, params.temperature) == 1


@pytest.mark.parametrize(("given", "used"), [(1e-5, 0.01), (0.009, 0.01), (0.01, 0.01), (0.02, 0.02)])
def test_low_temperatures_are_raised(given: float, used: float) -> None:
    params = SamplingParams(temperature=given, top_p=0.5)
    assert not params.greedy and (params.temperature, params.top_p) == (used, 0.5)


def test_greedy_filters_are_checked_all_the_same() -> None:
    refused("top_p", temperature=0, top_p=2)


def test_one_greedy_sample_at_most() -> None:
    assert "n is 2" in str(refused("n", temperature=0, n=2))
    refused("n", temperature=1e-6, n=2)
    SamplingParams(temperature=1e-5, n=2)


def test_values_that_mean_off() -> None:
    params = SamplingParams(top_k=-1, seed=-1, logit_bias={})
    assert (params.top_k, params.seed, params.logit_bias) == (0, None, None)


@pytest.mark.parametrize(("given", "used"), [(True, 1), (False, None), (5, 5), (-1, -1)])
def test_logprobs_may_be_a_flag(given: Any, used: int | None) -> None:
    assert SamplingParams(logprobs=given, prompt_logprobs=given) == SamplingParams(logprobs=used, prompt_logprobs=used)


@pytest.mark.parametrize(
    ("changed", "penalized"),
    [
        ({}, False),
        (dict(presence_penalty=-1), True),
        (dict(frequency_penalty=1), True),
        (dict(repetition_penalty=0.9), True),
    ],
)
def test_penalized(changed: dict[str, Any], penalized: bool) -> None:
    assert SamplingParams(**changed).penalized is penalized


# --- lists ----------------------------------------------------------------------------------------------------------


def test_stop_strings() -> None:
    assert SamplingParams(stop="end").stops == ("end",)
    assert SamplingParams(stop=["a", "b", "a"]).stops == ("a", "b")
    for bad in ("", ["a", ""], [1], [None], 5, {"a": 1}, b"a"):
        refused("stop", stop=bad)
    refused("stop", stop="a", detokenize=False)
    SamplingParams(stop=[], stop_token_ids=[1], detokenize=False)


def test_bad_words() -> None:
    assert SamplingParams(bad_words="word").bad_words == ("word",)
    assert SamplingParams(bad_words=["a"] * 128).bad_words == ("a",) * 128
    for bad in ([""], [1], 5, ["a"] * 129):
        refused("bad_words", bad_words=bad)


@pytest.mark.parametrize("name", ["stop_token_ids", "allowed_token_ids"])
def test_lists_of_ids(name: str) -> None:
    assert getattr(given_as(**{name: [5, 1, 5]}), name) == (5, 1)
    assert getattr(given_as(**{name: {7}}), name) == (7,)
    for bad in ([-1], [2**31], [1.0], [True], ["1"], [[1]], "12", 3, {1: 2}, [math.nan]):
        refused(name, **{name: bad})


def test_limits_of_the_lists() -> None:
    SamplingParams(stop_token_ids=[*range(128), 0], logit_bias=dict.fromkeys(range(1024), 1.0))
    assert "129" in str(refused("stop_token_ids", stop_token_ids=range(129)))
    assert "1025" in str(refused("logit_bias", logit_bias=dict.fromkeys(range(1025), 1.0)))
    refused("allowed_token_ids", allowed_token_ids=[])


def test_logit_bias() -> None:
    params = given_as(logit_bias={1: 101, "2": -1000.5, 3: 100, 4: 1})
    assert params.logit_bias == {1: 100, 2: -100, 3: 100, 4: 1}
    for bad in ({1: math.nan}, {1: math.inf}, {1: "1"}, {1: None}, {1: True}, {1: 10**400}):
        refused("logit_bias", logit_bias=bad)
    for bad in ({-1: 1}, {"-1": 1}, {"1.0": 1}, {1.0: 1}, {True: 1}, {2**31: 1}, {"²": 1}, {"9" * 5000: 1}, [(1, 1)]):
        refused("logit_bias", logit_bias=bad)


def test_the_callers_objects_are_not_changed() -> None:
    bias, stops = {1: 500.0}, [3]
    params = SamplingParams(logit_bias=bias, stop_token_ids=stops)
    bias[2], _ = 1.0, stops.append(4)
    assert params.logit_bias == {1: 100.0} and params.stop_token_ids == (3,)


def test_lengths_agree() -> None:
    SamplingParams(min_tokens=100, max_tokens=None)
    SamplingParams(min_tokens=5, max_tokens=5)
    assert "max_tokens 4" in str(refused("min_tokens", min_tokens=5, max_tokens=4))


@pytest.mark.parametrize("bad", ["CUMULATIVE", 0, None])
def test_output_kind(bad: Any) -> None:
    refused("output_kind", output_kind=bad)


# --- as a value -----------------------------------------------------------------------------------------------------


VALUES = st.fixed_dictionaries(
    {},
    optional=dict(
        n=st.integers(1, 16384),
        presence_penalty=st.floats(-2, 2),
        repetition_penalty=st.floats(0, 1e6, exclude_min=True),
        temperature=st.floats(0.1, 2),
        top_p=st.floats(0, 1, exclude_min=True),
        top_k=st.integers(-1, 100),
        seed=st.integers(-(2**63), 2**63 - 1),
        stop=st.lists(st.text(min_size=1)),
        logit_bias=st.dictionaries(st.integers(0, 2**31 - 1), st.floats(-1e300, 1e300)),
        min_tokens=st.integers(0, 16),
        logprobs=st.integers(-1, 20) | st.booleans(),
    ),
)


@given(VALUES)
def test_checked_values_pass_the_checks_again(values: dict[str, Any]) -> None:
    params = SamplingParams(**values)
    for twin in (replace(params), pickle.loads(pickle.dumps(params)), copy.deepcopy(params), copy.copy(params)):
        assert twin == params and twin is not params


def test_replace_checks_what_it_changes() -> None:
    params = SamplingParams(temperature=0.5, n=3)
    assert replace(params, n=1) == SamplingParams(temperature=0.5)
    with pytest.raises(RequestError, match="n is 3"):
        replace(params, temperature=0)
    with pytest.raises(RequestError, match="not supported yet"):
        replace(params, **{"best_of": 1})


def test_frozen() -> None:
    params: Any = SamplingParams()
    with pytest.raises(AttributeError):
        params.n = 2


# --- beam search ----------------------------------------------------------------------------------------------------


def test_beam_search_defaults() -> None:
    params = BeamSearchParams(beam_width=4, max_tokens=8)
    found = {f.name: getattr(params, f.name) for f in fields(params)}
    assert found == dict(
        beam_width=4,
        max_tokens=8,
        ignore_eos=False,
        temperature=0.0,
        length_penalty=1.0,
        include_stop_str_in_output=False,
    )
    assert replace(params, beam_width=1) == BeamSearchParams(beam_width=1, max_tokens=8)
    assert pickle.loads(pickle.dumps(params)) == params


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("beam_width", (0, -1, 16385, 1.0, True, "2", None, math.nan, 10**5000)),
        ("max_tokens", (0, 2**31, 1.5, True, None)),
        ("temperature", (0.5, -1, math.nan, "0", True, None)),
        ("length_penalty", (math.nan, math.inf, -100.5, 101, "1", False, 10**400)),
        ("ignore_eos", (1, None)),
        ("include_stop_str_in_output", ("no",)),
        ("best_of", (1,)),
    ],
)
def test_bad_beam_search_parameters_are_rejected(name: str, values: tuple[Any, ...]) -> None:
    for value in values:
        with pytest.raises(RequestError, match=name) as caught:
            BeamSearchParams(**{**dict(beam_width=2, max_tokens=2), name: value})
        assert caught.value.field == name
