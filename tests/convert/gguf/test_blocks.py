# SPDX-License-Identifier: Apache-2.0
"""Every block format against the dequantization of the package `gguf`, bit by bit."""

import gguf
import numpy as np
import pytest

from convert.gguf.blocks import FORMATS, OTHERS, unpack, values

QUANTIZED = [name for name, format in FORMATS.items() if format.unpack]


def random_rows(name: str, *, rows: int = 48, blocks: int = 6) -> np.ndarray:
    """Any bytes at all; scales may be NaN, infinite or subnormal."""
    size = blocks * FORMATS[name].size
    return np.random.default_rng(FORMATS[name].number).integers(0, 256, (rows, size), np.uint8)


@pytest.mark.parametrize("name", [*QUANTIZED, "BF16"])
def test_values_are_those_of_the_package(name: str) -> None:
    raw = random_rows(name)
    with np.errstate(invalid="ignore"):
        want = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[name])
    got = values(name, raw)
    numbers = ~np.isnan(want)
    assert got.dtype == np.float32 and got.shape == want.shape
    assert np.array_equal(np.isnan(got), ~numbers)
    assert np.array_equal(got[numbers].view(np.uint32), want[numbers].view(np.uint32))
    assert numbers.mean() > 0.9


@pytest.mark.parametrize(("name", "dtype"), [("F16", "f2"), ("F32", "f4"), ("F64", "f8")])
def test_plain_values(name: str, dtype: str) -> None:
    want = np.random.default_rng(0).normal(size=(5, 7)).astype(dtype)
    assert np.array_equal(values(name, want.view(np.uint8)), want.astype(np.float32))


def test_the_table_is_that_of_the_package() -> None:
    for name, format in FORMATS.items():
        kind = gguf.GGMLQuantizationType[name]
        assert (format.columns, format.size) == gguf.GGML_QUANT_SIZES[kind]
        assert format.number == kind.value
    for number, name in OTHERS.items():
        assert gguf.GGMLQuantizationType(number).name == name


@pytest.mark.parametrize("name", QUANTIZED)
def test_groups_share_a_scale(name: str) -> None:
    found = unpack(name, random_rows(name, rows=3))
    group = FORMATS[name].group
    assert group is not None and found.codes.dtype == np.int8
    assert found.scales.shape == (3, found.codes.shape[1] // group)
    assert found.minimums is None or found.minimums.shape == found.scales.shape
