# SPDX-License-Identifier: Apache-2.0
"""The block formats of GGUF tensors: how many values a block has, and what they are.

A row is a sequence of blocks. Values are codes * scale - minimum, with a scale, and in some formats a minimum, for each
group of 16 or 32 columns. Formats that end in _K have blocks of 256 columns, whose groups' scales are themselves codes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

type Array = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True)
class GroupedRows:
    """Rows of values as codes * scales - minimums, exact in float32."""

    codes: Array  # int8 [rows, columns]
    scales: Array  # float32 [rows, groups]
    minimums: Array | None  # likewise; None: no values are subtracted

    def values(self) -> Array:
        rows, groups = self.scales.shape
        found = self.codes.reshape(rows, groups, -1).astype(np.float32)
        with np.errstate(invalid="ignore"):
            found *= self.scales[:, :, None]
            if self.minimums is not None:
                found -= self.minimums[:, :, None]
        return found.reshape(rows, -1)


@dataclass(frozen=True, slots=True)
class BlockFormat:
    number: int  # in the file
    columns: int  # of a block
    size: int  # of a block in bytes
    group: int | None = None  # columns that share a scale; None: not quantized
    unpack: Callable[[Array], GroupedRows] | None = None  # from bytes [rows, blocks, size]


def values(name: str, raw: Array) -> Array:
    """The values, as float32, of rows that are given as bytes [rows, bytes per row]."""
    if FORMATS[name].unpack is not None:
        return unpack(name, raw).values()
    if name == "BF16":
        return (raw.view("<u2").astype(np.uint32) << 16).view(np.float32)
    return raw.view({"F16": "<f2", "F32": "<f4", "F64": "<f8"}[name]).astype(np.float32)


def unpack(name: str, raw: Array) -> GroupedRows:
    """Quantized rows, given as bytes [rows, bytes per row], as codes and scales."""
    format = FORMATS[name]
    assert format.unpack is not None
    with np.errstate(invalid="ignore"):  # a broken scale gives NaN
        return format.unpack(raw.reshape(len(raw), -1, format.size))


# --- parts of blocks ------------------------------------------------------------------------------------------------


def _half(blocks: Array, at: int) -> Array:
    """The float16 at this byte of every block, as float32 [rows, blocks, 1]."""
    return np.ascontiguousarray(blocks[:, :, at : at + 2]).view("<f2").astype(np.float32)


def _shifted(part: Array, width: int, bits: int) -> Array:
    """Fields of so many bits: for each run of `width` bytes, the lowest field of all of them, then the next, ..."""
    runs = part.reshape(*part.shape[:2], -1, 1, width)
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    return (runs >> shifts & np.uint8(2**bits - 1)).reshape(*part.shape[:2], -1)


def _groups(codes: Array, scales: Array, minimums: Array | None = None) -> GroupedRows:
    rows = len(codes)
    return GroupedRows(
        np.ascontiguousarray(codes).view(np.int8).reshape(rows, -1),
        scales.reshape(rows, -1),
        None if minimums is None else minimums.reshape(rows, -1),
    )


def _centred(codes: Array, zero: int) -> Array:
    return codes.view(np.int8) - np.int8(zero)


# --- blocks of 32 columns -------------------------------------------------------------------------------------------


def _q4_0(blocks: Array) -> GroupedRows:
    return _groups(_centred(_shifted(blocks[:, :, 2:], 16, 4), 8), _half(blocks, 0))


def _q4_1(blocks: Array) -> GroupedRows:
    return _groups(_shifted(blocks[:, :, 4:], 16, 4), _half(blocks, 0), -_half(blocks, 2))


def _fifth_bits(part: Array) -> Array:
    """The bits of a little-endian number of 32 bits, each as 16."""
    return np.unpackbits(part, axis=-1, bitorder="little") << np.uint8(4)


def _q5_0(blocks: Array) -> GroupedRows:
    codes = _shifted(blocks[:, :, 6:], 16, 4) | _fifth_bits(blocks[:, :, 2:6])
    return _groups(_centred(codes, 16), _half(blocks, 0))


def _q5_1(blocks: Array) -> GroupedRows:
    codes = _shifted(blocks[:, :, 8:], 16, 4) | _fifth_bits(blocks[:, :, 4:8])
    return _groups(codes, _half(blocks, 0), -_half(blocks, 2))


def _q8_0(blocks: Array) -> GroupedRows:
    return _groups(blocks[:, :, 2:], _half(blocks, 0))


# --- blocks of 256 columns ------------------------------------------------------------------------------------------


def _q2_k(blocks: Array) -> GroupedRows:
    both = blocks[:, :, :16]
    scales = (both & np.uint8(15)).astype(np.float32) * _half(blocks, 80)
    minimums = (both >> np.uint8(4)).astype(np.float32) * _half(blocks, 82)
    return _groups(_shifted(blocks[:, :, 16:80], 32, 2), scales, minimums)


def _q3_k(blocks: Array) -> GroupedRows:
    high = _shifted(blocks[:, :, :32], 32, 1) << np.uint8(2)
    codes = _shifted(blocks[:, :, 32:96], 32, 2) | high
    low, rest = _shifted(blocks[:, :, 96:104], 8, 4), _shifted(blocks[:, :, 104:108], 4, 2)
    scales = _centred(low | rest << np.uint8(4), 32).astype(np.float32) * _half(blocks, 108)
    return _groups(_centred(codes, 4), scales)


def _six_bits(packed: Array) -> tuple[Array, Array]:
    """Eight scales and eight minimums of six bits, from 12 bytes."""
    low, middle, last = packed[:, :, :4], packed[:, :, 4:8], packed[:, :, 8:]
    first, rest, four = np.uint8(63), np.uint8(48), np.uint8(4)
    scales = np.concatenate((low & first, last & np.uint8(15) | low >> np.uint8(2) & rest), axis=-1)
    minimums = np.concatenate((middle & first, last >> four | middle >> np.uint8(2) & rest), axis=-1)
    return scales, minimums


def _q4_k(blocks: Array) -> GroupedRows:
    scales, minimums = (each.astype(np.float32) for each in _six_bits(blocks[:, :, 4:16]))
    codes = _shifted(blocks[:, :, 16:], 32, 4)
    return _groups(codes, scales * _half(blocks, 0), minimums * _half(blocks, 2))


def _q5_k(blocks: Array) -> GroupedRows:
    scales, minimums = (each.astype(np.float32) for each in _six_bits(blocks[:, :, 4:16]))
    codes = _shifted(blocks[:, :, 48:], 32, 4) | _shifted(blocks[:, :, 16:48], 32, 1) << np.uint8(4)
    return _groups(codes, scales * _half(blocks, 0), minimums * _half(blocks, 2))


def _q6_k(blocks: Array) -> GroupedRows:
    codes = _shifted(blocks[:, :, :128], 64, 4) | _shifted(blocks[:, :, 128:192], 32, 2) << np.uint8(4)
    scales = blocks[:, :, 192:208].view(np.int8).astype(np.float32) * _half(blocks, 208)
    return _groups(_centred(codes, 32), scales)


FORMATS = {
    "F32": BlockFormat(0, 1, 4),
    "F16": BlockFormat(1, 1, 2),
    "BF16": BlockFormat(30, 1, 2),
    "F64": BlockFormat(28, 1, 8),
    "Q4_0": BlockFormat(2, 32, 18, 32, _q4_0),
    "Q4_1": BlockFormat(3, 32, 20, 32, _q4_1),
    "Q5_0": BlockFormat(6, 32, 22, 32, _q5_0),
    "Q5_1": BlockFormat(7, 32, 24, 32, _q5_1),
    "Q8_0": BlockFormat(8, 32, 34, 32, _q8_0),
    "Q2_K": BlockFormat(10, 256, 84, 16, _q2_k),
    "Q3_K": BlockFormat(11, 256, 110, 16, _q3_k),
    "Q4_K": BlockFormat(12, 256, 144, 32, _q4_k),
    "Q5_K": BlockFormat(13, 256, 176, 32, _q5_k),
    "Q6_K": BlockFormat(14, 256, 210, 16, _q6_k),
}

# For error messages: names of formats that are not supported.
OTHERS = {
    9: "Q8_1",
    15: "Q8_K",
    16: "IQ2_XXS",
    17: "IQ2_XS",
    18: "IQ3_XXS",
    19: "IQ1_S",
    20: "IQ4_NL",
    21: "IQ3_S",
    22: "IQ2_S",
    23: "IQ4_XS",
    29: "IQ1_M",
    34: "TQ1_0",
    35: "TQ2_0",
    39: "MXFP4",
}
