# SPDX-License-Identifier: Apache-2.0
"""Tile sizes: the tunable values of every kernel, and the look-up in a table of measured ones (`tuning.json`).

The GPU run book (`python -m benchmarks.gpu --section sweep`) writes the table. A shape or device without an entry uses
the defaults of the op's module.

tuning.json: {device kind: {op: {key: {knob: value}}}}, keys as `key(...)` spells them.
"""

import functools
import json
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from pallas_kernels import dispatch

TABLE = Path(__file__).with_name("tuning.json")


@dataclass(frozen=True)
class DecodeTiles:
    """Attention of decode rows."""

    block_kv: int = 64  # KV tokens per loop step
    splits: int = 1  # programs that share one row and head group
    num_warps: int = 4
    num_stages: int = 3


@dataclass(frozen=True)
class RaggedTiles:
    """Attention of all other rows."""

    block_rows: int = 128  # (query token, head of the group) pairs per program
    block_kv: int = 64
    num_warps: int = 8
    num_stages: int = 2


@dataclass(frozen=True)
class SamplingTiles:
    """Sampling."""

    block: int = 2048  # vocabulary entries per loop step: the lanes of a row
    pivots: int = 8  # thresholds tried per pass over the row
    num_warps: int = 16


@dataclass(frozen=True)
class MatmulTiles:
    """Grouped matmul."""

    block_rows: int = 16  # rows of the output per program
    block_columns: int = 64
    block_inner: int = 64  # of the contracted axis, per loop step
    num_warps: int = 4
    num_stages: int = 4


@dataclass(frozen=True)
class QuantTiles:
    """Matmul with weights of 4 or 8 bits."""

    block_rows: int = 16  # rows of x per program
    block_columns: int = 128  # rows of the weight, which are columns of the output
    block_inner: int = 128  # columns of the weight, per loop step
    splits: int = 1  # programs that share the contracted axis
    num_warps: int = 2
    num_stages: int = 4


type Tiles = DecodeTiles | RaggedTiles | SamplingTiles | MatmulTiles | QuantTiles


@functools.cache
def _table() -> dict[str, dict[str, dict[str, dict[str, int]]]]:
    return json.loads(TABLE.read_text())


def key(**properties: Any) -> str:
    """A shape as the table spells it, such as "dim=128 dtype=bfloat16 group=4 rows=64"."""
    return " ".join(f"{name}={properties[name]}" for name in sorted(properties))


def choose[T: Tiles](op: str, shape: str, default: T) -> T:
    """The measured tiles for this op, shape (a `key(...)`) and kind of device, or `default`."""
    measured = _table().get(dispatch.device_kind(), {}).get(op, {}).get(shape)
    if measured is None:
        return default
    known = {f.name for f in fields(default)}
    unknown = set(measured) - known
    if unknown:
        raise ValueError(f"{TABLE.name}: {op} has knobs {sorted(unknown)}, expected some of {sorted(known)}")
    return replace(default, **measured)
