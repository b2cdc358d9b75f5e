# SPDX-License-Identifier: Apache-2.0
"""The kinds of weight with shared scales: values, layouts of codes, products; against formulas written out here."""

from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxserve.quant import groups, packing, schemes
from jaxserve.quant.kinds import KINDS
from jaxserve.quant.scheme import Scheme
from jaxserve.quant.tensor import QuantTensor

ROWS, COLUMNS, FLOAT32 = 6, 64, jnp.dtype(jnp.float32)

SCHEMES: dict[str, tuple[int, Scheme]] = {
    "4 bits signed, float16": (4, schemes.in_groups(bits=4, group=16, scales="float16", signed=True)),
    "4 bits, zeros, bfloat16": (4, schemes.in_groups(bits=4, group=32, scales="bfloat16", zeros="uint8")),
    "4 bits, minimums": (4, schemes.in_groups(bits=4, group=32, scales="float16", minimums="float16")),
    "4 bits in any order": (
        4,
        schemes.in_groups(bits=4, group=16, scales="float16", zeros="uint8", ordered=True),
    ),
    "2 bits, rows": (2, schemes.in_groups(bits=2, group=None, scales="float32", zeros="int8")),
    "2 bits signed": (2, schemes.in_groups(bits=2, group=4, scales="float16", signed=True)),
    "3 bits": (3, schemes.in_groups(bits=3, group=8, scales="float16", zeros="uint8")),
    "3 bits signed": (3, schemes.in_groups(bits=3, group=8, scales="float16", signed=True)),
    "6 bits signed": (6, schemes.in_groups(bits=6, group=16, scales="float16", signed=True)),
    "8 bits": (8, schemes.in_groups(bits=8, group=16, scales="float16", zeros="uint8")),
    "8 bits signed, rows": (8, schemes.in_groups(bits=8, group=None, scales="float32", signed=True)),
    "float8": (8, schemes.float8(group=16)),
    "float8 by row": (8, schemes.float8(group=None, codes="float8_e5m2")),
    "e2m1, exponents": (4, schemes.table("e2m1", group=32, scales="uint8")),
    "e2m1, two scales": (4, schemes.table("e2m1", group=16, scales="float8_e4m3fn", row_scales=True)),
    "nf4": (4, schemes.table("nf4", group=64, scales="float32")),
    "fp4": (4, schemes.table("fp4", group=64, scales="float32")),
}
# From the definitions: quantiles as bitsandbytes publishes them, and floats of 4 bits from their parts.
NF4 = """-1.0 -0.6961928009986877 -0.5250730514526367 -0.39491748809814453 -0.28444138169288635 -0.18477343022823334
-0.09105003625154495 0.0 0.07958029955625534 0.16093020141124725 0.24611230194568634 0.33791524171829224
0.44070982933044434 0.5626170039176941 0.7229568362236023 1.0"""
FP4 = (0, 0.0625, 8, 12, 4, 6, 2, 3)


def value(kind: str, code: float) -> float:
    if kind == "nf4":
        return float(NF4.split()[int(code)])
    if kind == "fp4":
        return float(np.float32(FP4[int(code) % 8]) / np.float32(12)) * (-1 if code >= 8 else 1)
    if kind == "e2m1":
        sign, exponent, mantissa = int(code) >> 3, int(code) >> 1 & 3, int(code) & 1
        return (-1) ** sign * (mantissa / 2 if exponent == 0 else 2.0 ** (exponent - 1) * (1 + mantissa / 2))
    return float(code)


def made(bits: int, scheme: Scheme, *, seed: int = 0, rows: int = ROWS) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Random arrays of this scheme, and the weight that they stand for in float64."""
    random = np.random.default_rng(seed)
    signed, group = scheme.components[0].dtype == "int8", scheme.components[1].columns
    arrays: dict[str, np.ndarray] = {}
    for each in scheme.components:
        shape = (*(rows,) * each.rows, *(() if each.columns is None else (COLUMNS // each.columns,)))
        dtype = np.dtype(getattr(ml_dtypes, each.dtype, each.dtype))
        if each.name == "order":
            arrays["order"] = random.permutation(COLUMNS).astype(np.int32) // (group or 1)
        elif each.name == "zeros":
            arrays["zeros"] = random.integers(0, 1 << bits, shape).astype(dtype)
        elif each.dtype == "uint8":
            arrays[each.name] = random.integers(117, 130, shape, np.uint8)
        else:
            arrays[each.name] = (random.uniform(0.5, 2, shape) / 8).astype(dtype)
    lowest = -(1 << bits - 1) if signed else 0
    logical: Any = random.integers(lowest, lowest + (1 << bits), (rows, COLUMNS))
    if scheme.kind == "float8":
        logical = (random.standard_normal((rows, COLUMNS)) * 16).astype(arrays["codes"].dtype)
        arrays["codes"] = logical
    else:
        arrays["codes"] = in_bytes(logical, scheme.components[0].columns or 1).view("int8" if signed else "uint8")
    wide = {name: array.astype(np.float64) for name, array in arrays.items()}
    if wide["scales"].dtype and arrays["scales"].dtype == np.uint8:
        wide["scales"] = 2.0 ** (wide["scales"] - 127)
    weight = np.zeros((rows, COLUMNS))
    for n in range(rows):
        for k in range(COLUMNS):
            at = (n, ...) if group is None else (n, arrays["order"][k] if "order" in arrays else k // group)
            one = value(scheme.kind, float(logical[n, k]))
            one = (one - float(wide["zeros"][at] if "zeros" in wide else 0)) * float(wide["scales"][at])
            one = one * (float(wide["row_scales"][n]) if "row_scales" in wide else 1)
            weight[n, k] = one + (float(wide["minimums"][at]) if "minimums" in wide else 0)
    return arrays, weight


def in_bytes(logical: np.ndarray, per: int) -> np.ndarray:
    """Each byte as a number, code by code."""
    width = 8 // per
    found = np.zeros((logical.shape[0], logical.shape[1] // per), np.uint8)
    for n, k in np.ndindex(logical.shape):
        found[n, k // per] |= (int(logical[n, k]) % (1 << width)) << width * (k % per)
    return found


def tensor(scheme: Scheme, arrays: dict[str, np.ndarray], *, experts: bool = False) -> QuantTensor:
    return KINDS[scheme.kind]({name: jnp.asarray(array) for name, array in arrays.items()}, scheme, experts)


@pytest.mark.parametrize("name", SCHEMES)
def test_values_are_exact(name: str) -> None:
    bits, scheme = SCHEMES[name]
    arrays, weight = made(bits, scheme)
    one = tensor(scheme, arrays)
    assert one.shape == (ROWS, COLUMNS)
    np.testing.assert_array_equal(np.asarray(one.dense(FLOAT32)), weight.astype(np.float32))
    half = np.asarray(one.dense(jnp.dtype(jnp.bfloat16)))
    np.testing.assert_array_equal(half, weight.astype(np.float32).astype(jnp.bfloat16))


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("tokens", [1, 5])
def test_products_are_those_of_the_weight(name: str, tokens: int) -> None:
    bits, scheme = SCHEMES[name]
    arrays, weight = made(bits, scheme)
    x = np.random.default_rng(1).standard_normal((tokens, COLUMNS)).astype(np.float32)
    found = np.asarray(tensor(scheme, arrays).matmul(jnp.asarray(x), FLOAT32))
    np.testing.assert_allclose(found, x @ weight.T, rtol=1e-4, atol=1e-5 * np.abs(weight).sum(1).max())


@pytest.mark.parametrize("name", SCHEMES)
def test_grouped_products_are_those_of_each_expert(name: str) -> None:
    bits, scheme = SCHEMES[name]
    each = [made(bits, scheme, seed=seed) for seed in range(3)]
    stack = {part: np.stack([arrays[part] for arrays, _ in each]) for part in each[0][0]}
    x = np.random.default_rng(2).standard_normal((9, COLUMNS)).astype(np.float32)
    offsets = jnp.asarray([0, 4, 4, 8], jnp.int32)  # the second has no rows, and the last row no expert
    whole = tensor(scheme, stack, experts=True)
    wanted = np.stack([weight for _, weight in each])
    np.testing.assert_array_equal(np.asarray(whole.dense(FLOAT32)), wanted.astype(np.float32))
    found = np.asarray(whole.grouped_matmul(jnp.asarray(x), offsets))
    for rows, weight in ((slice(0, 4), wanted[0]), (slice(4, 8), wanted[2])):
        np.testing.assert_allclose(found[rows], x[rows] @ weight.T, rtol=1e-4, atol=1e-5 * np.abs(weight).sum(1).max())
    assert not found[8].any()


@pytest.mark.parametrize("name", SCHEMES)
def test_padding_is_zero(name: str) -> None:
    _, scheme = SCHEMES[name]
    arrays, _ = made(*SCHEMES[name])
    zeros = tensor(scheme, {part: np.zeros_like(array) for part, array in arrays.items()})
    assert not np.asarray(zeros.dense(FLOAT32)).any()


@pytest.mark.parametrize("name", SCHEMES)
def test_rows_are_taken_as_they_are(name: str) -> None:
    """As from an embedding."""
    bits, scheme = SCHEMES[name]
    arrays, weight = made(bits, scheme)
    ids = jnp.asarray([3, 0, 3])
    taken = tensor(scheme, arrays).take(ids, lambda array, ids: array[ids])
    np.testing.assert_array_equal(np.asarray(taken.dense(FLOAT32)), weight.astype(np.float32)[[3, 0, 3]])


@pytest.mark.parametrize("name", ["4 bits, zeros, bfloat16", "4 bits in any order", "2 bits, rows", "float8", "nf4"])
def test_products_are_made_a_few_rows_at_a_time(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On CPUs, for matrices that do not fit the cache; the last rows are computed twice if the rest is not even."""
    bits, scheme = SCHEMES[name]
    arrays, weight = made(bits, scheme)
    x = jnp.asarray(np.random.default_rng(1).standard_normal((3, COLUMNS)), jnp.float32)
    monkeypatch.setattr(groups, "_DECODED", 4 * COLUMNS)
    found = tensor(scheme, arrays).matmul(x, FLOAT32)
    np.testing.assert_allclose(found, x @ weight.T, rtol=1e-4, atol=1e-5 * np.abs(weight).sum(1).max())
    stack = {part: np.stack([array, array]) for part, array in arrays.items()}
    each = tensor(scheme, stack, experts=True).grouped_matmul(x, jnp.asarray([0, 1, 3], jnp.int32))
    np.testing.assert_allclose(each, found, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("columns", [8, 24, 40])
def test_codes_leave_words_and_enter_bytes_in_order(bits: int, columns: int) -> None:
    random = np.random.default_rng(bits)
    logical = random.integers(0, 1 << bits, (3, columns), np.uint8)
    stream = sum(int(code) << bits * i for i, code in enumerate(logical[1]))
    words = -(-columns * bits // 32)
    data = np.frombuffer(stream.to_bytes(words * 4, "little"), np.int32)
    found = packing.bits_of(np.stack([data] * 2), bits)[:, :columns]
    np.testing.assert_array_equal(found, logical[[1, 1]])
    per = schemes.per_byte(bits)
    np.testing.assert_array_equal(packing.pack(logical, bits), in_bytes(logical, per))
    signed = logical.view(np.int8) - np.int8((1 << bits - 1) if bits < 8 else 0)
    np.testing.assert_array_equal(packing.pack(signed, bits).view(np.uint8), in_bytes(signed, per))


def test_an_exponent_of_255_is_not_a_number() -> None:
    arrays = {"codes": np.full((1, 16), 0x22, np.uint8), "scales": np.array([[255]], np.uint8)}
    found = tensor(SCHEMES["e2m1, exponents"][1], arrays).dense(FLOAT32)
    assert np.isnan(np.asarray(found)).all()
