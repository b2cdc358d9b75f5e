# SPDX-License-Identifier: Apache-2.0
"""Scales that checkpoints have for a whole matrix, its rows, or blocks of rows and columns, as scales of rows or of
groups of columns: what blocks share is repeated for each row, and finer groups stand for blocks that do not divide the
columns."""

import math
from collections.abc import Callable
from functools import cache

import numpy as np

from jaxserve.quant.formats.format import Array

type Block = tuple[int, int]  # rows and columns that share a scale


def group_of(shape: tuple[int, ...], rows: int, columns: int, block: Block | None) -> int | None:
    """The group of columns that scales of this shape are for, in a matrix [rows, columns]; None for whole rows, also
    if there is one scale for all. A ValueError if the matrix can have no such scales."""
    if block is not None and _without_ones(shape) == blocks(rows, columns, block):
        return math.gcd(columns, block[1])
    if math.prod(shape) not in (1, rows) or max(shape, default=1) != math.prod(shape):
        wanted = "one value, or one for each row"
        if block is not None:
            wanted += f", or {list(blocks(rows, columns, block))}: one for each block of {block[0]} x {block[1]}"
        raise ValueError(wanted)
    return None


def blocks(rows: int, columns: int, block: Block) -> tuple[int, int]:
    return -(-rows // block[0]), -(-columns // block[1])


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    """As some store [rows, 1, columns, 1]."""
    return shape[::2] if len(shape) == 4 and shape[1::2] == (1, 1) else shape


@cache
def spread(rows: int, columns: int, block: Block | None, *, inverse: bool = False) -> Callable[[Array], Array]:
    """A function from stored scales to float32 [rows] or [rows, columns / group]. `inverse`: divisors are stored."""

    def unpack(stored: Array) -> Array:
        values = stored.astype(np.float32)
        if inverse:
            with np.errstate(divide="ignore"):
                values = np.float32(1) / values
        group = group_of(values.shape, rows, columns, block)
        if group is None or block is None:
            return np.broadcast_to(values.reshape(-1), (rows,))
        height, width = block
        values = values.reshape(blocks(rows, columns, block))
        values = np.repeat(values, width // group, axis=1)[:, : columns // group]
        return np.repeat(values, height, axis=0)[:rows] if height > 1 else values

    return unpack
