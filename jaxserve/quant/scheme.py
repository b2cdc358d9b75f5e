# SPDX-License-Identifier: Apache-2.0
"""Describes weights that are stored as several arrays, such as codes, scales and zero points. Plain data, without jax.

A weight is a matrix: rows are outputs, columns are inputs, both flattened. Its Scheme lists its arrays, which are
sharded, fused, repeated and padded along rows and columns as the matrix is; `tensor.py` computes with them. Quantized
checkpoints are read by `formats/`, and schemes.py has what most of them need.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

# How plain weights become codes; see rounding.py.
type Rounding = Literal["int8", "rows", "groups", "float8_tensor", "float8_rows", "float8_blocks"]
type StorageDtype = Literal[
    "int8",
    "uint8",
    "int16",
    "uint16",
    "int32",
    "uint32",
    "float8_e4m3fn",
    "float8_e5m2",
    "float8_e8m0fnu",
    "bfloat16",
    "float16",
    "float32",
]


@dataclass(frozen=True, kw_only=True)
class Component:
    """One array of a weight, [*rows, columns / `columns`]. Padding is zeros in all components, so a weight whose
    components are zero must be zero."""

    name: str
    dtype: StorageDtype
    rows: bool = True  # False: all rows share its values, and fused weights must have equal values
    columns: int | None = 1  # how many adjacent columns share a value; None: all of them
    columns_first: bool = False  # the engine stores it as [columns, *rows]; the public tree never does
    whole: bool = False  # every shard has the values of all columns, even if columns are sharded


@dataclass(frozen=True, kw_only=True)
class Scheme:
    kind: str  # the arithmetic: a name in tensor.KINDS
    components: tuple[Component, ...]  # the first holds the codes: it has a value for each row and group of columns


@dataclass(frozen=True, kw_only=True)
class Quantized:
    """The scheme of the weights with this public path, in which `{layer}` stands for any layer's number. A path with a
    number takes precedence. None: one plain array. `rounding`: how plain weights are rounded to it as they come."""

    path: str
    scheme: Scheme | None
    rounding: Rounding | None = None


def problems(scheme: Scheme) -> Iterator[str]:
    """The faults of a scheme that no weight can have."""
    names = [component.name for component in scheme.components]
    if len({*names}) < len(names) or not all(name.isidentifier() for name in names):
        yield f"components {names} are not distinct names"
    codes = scheme.components[0] if scheme.components else None
    if codes is None or not codes.rows or codes.columns is None or codes.whole:
        yield f"the first component of scheme {scheme.kind!r} has no value for each row and group of columns"
