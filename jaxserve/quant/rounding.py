# SPDX-License-Identifier: Apache-2.0
"""How plain weights are rounded, for models that are quantized while they are loaded. See schemes.py for the terms.

int8             by int8.py
rows             int8: a row's largest magnitude is 127
groups           4 bits with zero points: the codes of a group, 0 to 15, span its values and zero
float8_tensor    the largest magnitude of a matrix is 448, the largest number of float8_e4m3fn
float8_rows      that of a row
float8_blocks    that of a block of 128 x 128

Codes are the nearest ones, by the scales as they are stored; half-way values become even. numpy rounds what is read
from files, a few rows at a time, and jax what a program has in arrays.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.quant import int8
from jaxserve.quant.scheme import Rounding, Scheme
from jaxserve.quant.schemes import CODES, SCALES, ZEROS

BLOCK = 128
_FLOAT8 = np.float32(448)
_INT8, _TOP = np.float32(127), np.float32(15)  # the largest codes of 8 bits with a sign, and of 4 without
_CHUNK = 1 << 18  # values that numpy rounds at a time, so that they stay in the processor's cache

# Products instead of quotients: XLA divides by what is the same for many values so too, and numpy must agree.
_PER_FLOAT8, _PER_INT8, _PER_TOP = (np.float32(1) / most for most in (_FLOAT8, _INT8, _TOP))

type _Shared = dict[str, Any]  # the components besides the codes


def encode(rounding: Rounding, scheme: Scheme, weight: jax.Array) -> dict[str, jax.Array]:
    """The components of a matrix [rows, columns]."""
    if rounding == "int8":
        return int8.encode(scheme, weight)
    wide = weight.astype(jnp.float32)
    shared = _shared(rounding, scheme, wide, jnp)
    return shared | {CODES: codes_by(scheme, wide, shared, jnp)}


def encode_on_host(rounding: Rounding, scheme: Scheme, name: str, weight: Any) -> Any:
    """One component of a matrix [rows, columns], as `encode` computes it, in numpy."""
    rows, columns = weight.shape
    if rounding == "int8":
        return int8.encode_on_host(scheme, name, columns, weight)
    height = max(1, _CHUNK // columns // BLOCK) * BLOCK  # whole blocks
    chunks = [slice(at, min(at + height, rows)) for at in range(0, rows, height)]
    most = None
    if rounding == "float8_tensor":
        most = max((np.abs(weight[each]).max() for each in chunks), default=np.float32(0))
    found: list[Any] = []
    for each in chunks:
        wide = weight[each].astype(np.float32)
        shared = _shared(rounding, scheme, wide, np, most=most)
        found.append(codes_by(scheme, wide, shared, np) if name == CODES else shared[name])
    return np.concatenate(found)


def _shared(rounding: Rounding, scheme: Scheme, wide: Any, numbers: Any, *, most: Any = None) -> _Shared:
    """The scales and zero points of these rows; `numbers` is numpy or jax.numpy. `most`: the largest magnitude of the
    matrix, if these are not all of its rows."""
    match rounding:
        case "groups":
            return of_ranges(scheme, wide, numbers)
        case "float8_tensor":
            top = numbers.max(numbers.abs(wide)) if most is None else most
            return {SCALES: numbers.broadcast_to(top.astype(np.float32) * _PER_FLOAT8, wide.shape[:1])}
        case "float8_blocks":
            return {SCALES: _of_blocks(scheme, wide, numbers)}
        case _:
            step = _PER_INT8 if rounding == "rows" else _PER_FLOAT8
            return {SCALES: numbers.max(numbers.abs(wide), axis=-1) * step}


def of_ranges(scheme: Scheme, wide: Any, numbers: Any, *, share: float = 1) -> _Shared:
    """The scales and zero points of groups of 4-bit codes. `share`: of the range of values that codes span."""
    scales = scheme.components[1]
    parts = wide.reshape(len(wide), -1, scales.columns)
    low = numbers.minimum(numbers.min(parts, axis=-1), np.float32(0))
    high = numbers.maximum(numbers.max(parts, axis=-1), np.float32(0))
    if share != 1:
        low, high = low * np.float32(share), high * np.float32(share)
    stored = ((high - low) * _PER_TOP).astype(scales.dtype)
    zeros = numbers.clip(numbers.rint(-low / _safe(stored, numbers)), 0, _TOP)
    return {SCALES: stored, ZEROS: zeros.astype(np.uint8)}


def _of_blocks(scheme: Scheme, wide: Any, numbers: Any) -> Any:
    """Repeated for each row, and for each group of columns in a block."""
    rows, columns = wide.shape
    padded = numbers.pad(numbers.abs(wide), ((0, -rows % BLOCK), (0, -columns % BLOCK)))
    height, width = (size // BLOCK for size in padded.shape)
    scales = numbers.max(padded.reshape(height, BLOCK, width, BLOCK), axis=(1, 3)) * _PER_FLOAT8
    group = scheme.components[1].columns
    assert group is not None
    spread = numbers.repeat(scales, BLOCK // group, axis=1)[:, : columns // group]
    return numbers.repeat(spread, BLOCK, axis=0)[:rows]


def codes_by(scheme: Scheme, wide: Any, shared: _Shared, numbers: Any) -> Any:
    """The codes of these rows, by their scales and zero points."""
    codes, scales = scheme.components[:2]
    parts = wide.reshape(len(wide), -1, scales.columns or wide.shape[1])
    inverse = np.float32(1) / _safe(shared[SCALES].reshape(parts.shape[:2]), numbers)
    values = parts * inverse[..., None]
    if scheme.kind == "float8":
        # A scale is rounded too, and a quotient may exceed the range by that.
        return numbers.clip(values, -_FLOAT8, _FLOAT8).astype(codes.dtype).reshape(wide.shape)
    values = numbers.rint(values)
    if ZEROS not in shared:
        return numbers.clip(values, -_INT8, _INT8).astype(np.int8).reshape(wide.shape)
    values = numbers.clip(values + shared[ZEROS].astype(np.float32)[..., None], 0, _TOP)
    values = values.astype(np.uint8).reshape(wide.shape)
    return values[:, 0::2] | values[:, 1::2] << np.uint8(4)


def _safe(scales: Any, numbers: Any) -> Any:
    wide = scales.astype(np.float32)
    return numbers.where(wide > 0, wide, np.float32(1))
