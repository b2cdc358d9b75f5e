# SPDX-License-Identifier: Apache-2.0
"""The declarations of sampling parameters agree with the kernels, request bodies and documentation."""

import json
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest

from jaxserve.errors import RequestError
from jaxserve.sampling import columns
from jaxserve.server.errors import ApiError
from jaxserve.server.protocol.base import parse
from jaxserve.server.protocol.completion import CompletionRequest
from jaxserve.types.parameters import Acts, markdown_table
from jaxserve.types.sampling_params import FIELDS, SamplingParams
from pallas_kernels import sampling

BY_NAME = {each.name: each for each in FIELDS}
TYPES = get_type_hints(SamplingParams)


@pytest.mark.parametrize("name", BY_NAME)
def test_a_declaration_agrees_with_the_type(name: str) -> None:
    each = BY_NAME[name]
    assert not each.optional or type(None) in get_args(TYPES[name])
    assert each.check(each.default) == each.default and each.check(each.off) == each.off
    assert getattr(SamplingParams(), name) == each.default
    assert each.about.endswith(".") and each.about[0].isupper()


def test_kernels_take_the_columns() -> None:
    given = {*columns.COLUMNS, "position"} - {"controlled"}
    assert given == set(sampling.RowParams._fields)


def test_columns_hold_the_values() -> None:
    params = SamplingParams(temperature=0.5, top_k=7, top_p=0.25, min_p=0.125)
    packed = dict(zip(columns.COLUMNS, columns.pack(params, controlled=True, seed=2**32 - 1), strict=True))
    assert packed["controlled"] == 1 and packed["seed"].view(np.uint32) == 2**32 - 1
    for each in columns.OF_PARAMS:
        assert packed[each.name].view(each.dtype) == getattr(params, each.name)


@pytest.mark.parametrize("name", [each.name for each in columns.OF_PARAMS])
def test_greedy_rows_have_every_column_off(name: str) -> None:
    assert getattr(SamplingParams(temperature=0, top_k=7, top_p=0.25, min_p=0.125), name) == BY_NAME[name].off


@pytest.mark.parametrize("name", [each.name for each in FIELDS if each.sent])
def test_bodies_have_the_same_ranges(name: str) -> None:
    """Bodies and SamplingParams accept and reject the same values at the edges of each range."""
    schema: Any = CompletionRequest.model_json_schema()["properties"][name]
    assert schema["description"] == BY_NAME[name].about
    value = next(each for each in schema["anyOf"] if each.get("type") != "null")
    edges = [value[edge] for edge in ("minimum", "maximum") if edge in value]
    for edge in edges:
        body = parse(CompletionRequest, json.dumps({"prompt": "x", "max_tokens": 2**31 - 1, name: edge}).encode())
        SamplingParams(max_tokens=None, **body.sampling)
    for outside in (edge + step for edge, step in zip(edges, (-1, 1), strict=False)):
        with pytest.raises(ApiError, match=f"{name} must be"):
            parse(CompletionRequest, json.dumps({"prompt": "x", name: outside}).encode())
        with pytest.raises(RequestError, match=name):
            SamplingParams(**{name: outside})


def test_the_table_has_a_line_for_each() -> None:
    lines = markdown_table(FIELDS).splitlines()
    assert len(lines) == 2 + len(FIELDS)
    assert all(line.count("|") == 5 for line in lines)
    assert lines[2].startswith("| `n` | a whole number from 1 to 16384 | 1 |")


def test_every_parameter_on_rows_has_a_type_for_devices() -> None:
    assert all(bool(each.dtype) == (each.acts is Acts.ROW) for each in FIELDS)
