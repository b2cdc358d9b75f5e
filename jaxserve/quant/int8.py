# SPDX-License-Identifier: Apache-2.0
"""int8 weights: a product of integers, exact in int32, and scaled afterwards.

W[n, k] = codes[n, k] * scales[n] * tilt[k], rounded when the model is loaded. The tilt makes columns alike, so that a
few large ones do not take the range of all; weights that are fused with others have none, because these share their
input. Activations have values far above the rest in some places, which 8 bits cannot represent beside the others: each
token becomes two rows of int8, rounded values and what rounding lost. CPUs multiply int8 several times faster than
wider numbers, and weights take a quarter of float32's memory. GPUs multiply few rows as they are: reading the codes is
what takes the time.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxserve.quant.scheme import Component, Scheme
from jaxserve.quant.tensor import QuantTensor, register
from pallas_kernels import dispatch
from pallas_kernels.on_cpu.grouped_matmul import grouped_matmul as grouped_on_cpu
from pallas_kernels.on_cpu.matmul import matmul as matmul_on_cpu
from pallas_kernels.quant_matmul import MOST_ROWS, quant_matmul, takes

CODES, SCALES, TILT = "codes", "scales", "tilt"
_ROWS = Component(name=CODES, dtype="int8"), Component(name=SCALES, dtype="float32", columns=None)
FUSED = Scheme(kind="int8", components=_ROWS)
ALONE = Scheme(kind="int8", components=(*_ROWS, Component(name=TILT, dtype="float32", rows=False)))
_MOST = np.float32(127)
_FINER = np.float32(2 * 127)  # what rounding lost is at most half a step, which these steps divide
_CHUNK = 1 << 18  # values that numpy encodes at a time, so that they stay in the processor's cache


def encode(scheme: Scheme, weight: jax.Array) -> dict[str, jax.Array]:
    """The components of a matrix [rows, columns]."""
    found: dict[str, jax.Array] = {}
    if scheme == ALONE:
        found[TILT] = _tilt(_squares(weight, jnp), len(weight), jnp)
        weight = weight.astype(jnp.float32) / found[TILT][None]
    codes, scales = _round_rows(weight, jnp)
    return found | {CODES: codes, SCALES: scales}


def encode_on_host(scheme: Scheme, name: str, columns: int, weight: Any) -> Any:
    """One component of a matrix, as `encode` computes it, in numpy: [rows, columns], [rows] or [columns]."""
    matrix = weight.reshape(-1, columns)
    size = max(1, _CHUNK // columns)
    chunks = [slice(at, at + size) for at in range(0, len(matrix), size)]
    tilt = np.ones(columns, np.float32)
    if scheme == ALONE:
        tilt = _tilt(sum(_squares(matrix[each], np) for each in chunks), len(matrix), np)
    if name == TILT:
        return tilt
    found = np.empty(matrix.shape, np.int8) if name == CODES else np.empty(len(matrix), np.float32)
    for each in chunks:
        found[each] = _round_rows(matrix[each].astype(np.float32) / tilt, np)[name != CODES]
    return found


def _squares(rows: Any, numbers: Any) -> Any:
    """Of each column, the sum of squares as shares of their row's largest; `numbers` is numpy or jax.numpy."""
    wide = rows.astype(np.float32)
    most = numbers.max(numbers.abs(wide), axis=-1)
    return numbers.sum(numbers.square(wide / numbers.where(most > 0, most, np.float32(1))[:, None]), axis=0)


def _tilt(squares: Any, rows: int, numbers: Any) -> Any:
    size = numbers.sqrt(squares / np.float32(rows))
    mean = numbers.mean(size)
    return numbers.where((size > 0) & (mean > 0), size / numbers.where(mean > 0, mean, np.float32(1)), np.float32(1))


def _round_rows(rows: Any, numbers: Any) -> tuple[Any, Any]:
    """int8 codes, and float32 scales, of each row."""
    wide = rows.astype(np.float32)
    scales = numbers.max(numbers.abs(wide), axis=-1) / _MOST
    safe = numbers.where(scales > 0, scales, np.float32(1))
    return numbers.rint(wide / safe[:, None]).astype(np.int8), scales


@register("int8")
@dataclass(frozen=True)
class Int8(QuantTensor):
    def dense(self, dtype: jnp.dtype) -> jax.Array:
        values = self.spread(CODES).astype(jnp.float32) * self.spread(SCALES)
        return (values * self.spread(TILT) if TILT in self.arrays else values).astype(dtype)

    def matmul(self, x: jax.Array, dtype: jnp.dtype) -> jax.Array:
        x = x * self.arrays[TILT][None].astype(x.dtype) if TILT in self.arrays else x
        codes, scales = self.arrays[CODES].reshape(-1, self.shape[-1]), self.arrays[SCALES].reshape(-1, 1)
        if dispatch.implementation() != "cpu" and x.shape[0] <= MOST_ROWS and takes(x, codes, scales):
            return quant_matmul(x, codes, scales, out_dtype=dtype)
        rows, steps = _two_rows(x)
        y = _joined(_product(rows, codes), steps)
        return (y * self.arrays[SCALES].reshape(1, -1)).astype(dtype)

    def grouped_matmul(self, x: jax.Array, offsets: jax.Array) -> jax.Array:
        if dispatch.implementation() != "cpu":
            return super().grouped_matmul(x, offsets)
        experts, *_, columns = self.shape
        place = jnp.arange(x.shape[0], dtype=jnp.int32)
        owner = jnp.sum(offsets[None, 1:] <= place[:, None], axis=-1, dtype=jnp.int32)  # `experts`: no expert

        def own(name: str) -> jax.Array:
            return self.arrays[name].reshape(experts, -1).at[owner].get(mode="clip")

        rows, steps = _two_rows(x * own(TILT).astype(x.dtype) if TILT in self.arrays else x)
        codes = self.arrays[CODES].reshape(experts, -1, columns)
        y = grouped_on_cpu(rows, codes, 2 * offsets, transposed=False, out_dtype=jnp.dtype(jnp.int32))
        return (_joined(y, steps) * own(SCALES)).astype(x.dtype)


def _two_rows(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Each row of x as two rows of int8, and its float32 step: x = (the first + the second / _FINER) * step."""
    first, steps = _round_rows(x, jnp)
    safe = jnp.where(steps > 0, steps, jnp.float32(1))
    lost = x.astype(jnp.float32) / safe[:, None] - first.astype(jnp.float32)
    second = jnp.rint(lost * _FINER).astype(jnp.int8)
    return jnp.stack((first, second), axis=1).reshape(-1, x.shape[1]), steps


def _joined(products: jax.Array, steps: jax.Array) -> jax.Array:
    """The products of both rows as one, in float32."""
    pairs = products.reshape(-1, 2, products.shape[1]).astype(jnp.float32)
    return (pairs[:, 0] + pairs[:, 1] * (1 / _FINER)) * steps[:, None]


def _product(rows: jax.Array, codes: jax.Array) -> jax.Array:
    if dispatch.implementation() == "cpu":
        return matmul_on_cpu(rows, codes)
    return lax.dot_general(rows, codes, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32)
