# SPDX-License-Identifier: Apache-2.0
"""Packs codes into bytes and takes them out of the words of checkpoints, in numpy: the host's side of schemes.py."""

from typing import Any

import numpy as np

from jaxserve.quant.schemes import per_byte

type Array = np.ndarray[Any, Any]


def pack(codes: Array, bits: int) -> Array:
    """Codes [..., columns] of at most 8 bits, in bytes of as many codes as schemes.per_byte says: the first in the
    lowest bits. Signed codes stay int8, others uint8."""
    per = per_byte(bits)
    if per == 1:
        return codes
    width = 8 // per
    low = codes.view(np.uint8) & np.uint8((1 << width) - 1)
    found = low[..., 0::per].copy()
    for place in range(1, per):
        found |= low[..., place::per] << np.uint8(width * place)
    return found.view(codes.dtype)


def codes_of(words: Array, bits: int, columns: int, *, signed: bool) -> Array:
    """int32 words [rows, n], a stream of unsigned codes along each row, as this many codes per row in our bytes;
    `signed`: with the middle of their range as zero."""
    middle = np.uint8(1 << (bits - 1))
    if bits in (2, 4, 8):  # our order already
        found = np.ascontiguousarray(words).view(np.uint8)[:, : columns * bits // 8]
        # The middle becomes zero when the highest bit of each code is flipped.
        return (found ^ np.uint8(_EACH[bits] * int(middle))).view(np.int8) if signed else found
    found = bits_of(words, bits)[:, :columns]
    return pack((found - middle).view(np.int8) if signed else found, bits)


_EACH = {2: 0b01010101, 4: 0b00010001, 8: 1}  # the lowest bit of each code in a byte


def bits_of(words: Array, bits: int) -> Array:
    """Codes of int32 words on the last axis, which are one stream of `bits` bits each, lowest first: uint8
    [..., words * 32 / bits]."""
    data = np.ascontiguousarray(words).view(np.uint8)
    if bits == 8:
        return data
    if 8 % bits == 0:
        shifts = np.arange(0, 8, bits, dtype=np.uint8)
        spread = data[..., None] >> shifts
        spread &= np.uint8((1 << bits) - 1)
        return spread.reshape(*data.shape[:-1], -1)
    # Of `bits` bytes, 8 codes: code i begins at bit i * bits, and takes bits of at most two bytes.
    if data.shape[-1] % bits:
        data = np.concatenate((data, np.zeros((*data.shape[:-1], -data.shape[-1] % bits), np.uint8)), axis=-1)
    data = data.reshape(*data.shape[:-1], -1, bits).astype(np.uint16)
    found = np.empty((*data.shape[:-1], 8), np.uint8)
    for i in range(8):
        byte, shift = divmod(i * bits, 8)
        wide = data[..., byte] >> np.uint16(shift)
        if shift + bits > 8:
            wide = wide | data[..., byte + 1] << np.uint16(8 - shift)
        found[..., i] = wide & np.uint16((1 << bits) - 1)
    return found.reshape(*words.shape[:-1], -1)
