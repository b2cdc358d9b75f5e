# SPDX-License-Identifier: Apache-2.0
"""The schemes of weights whose codes share scales by row or by group of columns, for the kinds in groups.py.

W[n, k] = (value(codes[n, k]) - zeros[n, g]) * scales[n, g] * row_scales[n] + minimums[n, g]

where g is the group of column k, and what a scheme leaves out is not computed. value() is the code itself, or what a
table has for it. int8 codes are signed, uint8 codes unsigned. Bytes hold 1, 2 or 4 codes of adjacent columns, the first
in the lowest bits; signed codes are two's complement in their bits. Groups are adjacent columns; with `order`, column k
is in group order[k], wherever it is.
"""

from collections.abc import Iterator
from typing import Literal

from jaxserve.quant.scheme import Component, Scheme, StorageDtype

CODES, SCALES, ZEROS, MINIMUMS = "codes", "scales", "zeros", "minimums"
ROW_SCALES, ORDER = "row_scales", "order"

type Kind = Literal["groups", "float8", "e2m1", "nf4", "fp4"]

# The kind in int8.py, without a tilt of the columns, which checkpoints do not have.
INT8 = Scheme(
    kind="int8",
    components=(Component(name=CODES, dtype="int8"), Component(name=SCALES, dtype="float32", columns=None)),
)


def per_byte(bits: int) -> int:
    """How many codes of so many bits a byte holds: codes of 3 bits take 4, and those of 5 to 7 take 8."""
    return 4 if bits <= 2 else 2 if bits <= 4 else 1


def in_groups(
    *,
    bits: int,
    group: int | None,
    scales: StorageDtype,
    signed: bool = False,
    zeros: StorageDtype | None = None,
    minimums: StorageDtype | None = None,
    ordered: bool = False,
) -> Scheme:
    """Integers in groups of `group` columns, or one group per row if that is None. `ordered`: groups in any order."""
    return _scheme(
        "groups",
        Component(name=CODES, dtype="int8" if signed else "uint8", columns=per_byte(bits)),
        group,
        {SCALES: scales, ZEROS: zeros, MINIMUMS: minimums},
        ordered=ordered,
    )


def float8(*, group: int | None, codes: StorageDtype = "float8_e4m3fn", scales: StorageDtype = "float32") -> Scheme:
    """Floating-point codes of 8 bits."""
    return _scheme("float8", Component(name=CODES, dtype=codes), group, {SCALES: scales})


def table(kind: Literal["e2m1", "nf4", "fp4"], *, group: int, scales: StorageDtype, row_scales: bool = False) -> Scheme:
    """Codes of 4 bits that a table has values for. uint8 scales are exponents: 2 to the power of scale - 127."""
    made = _scheme(kind, Component(name=CODES, dtype="uint8", columns=2), group, {SCALES: scales})
    if not row_scales:
        return made
    rows = Component(name=ROW_SCALES, dtype="float32", columns=None)
    return Scheme(kind=kind, components=(*made.components, rows))


def _scheme(
    kind: Kind, codes: Component, group: int | None, dtypes: dict[str, StorageDtype | None], *, ordered: bool = False
) -> Scheme:
    def components() -> Iterator[Component]:
        yield codes
        for name, dtype in dtypes.items():
            if dtype is not None:
                # Columns in any order may need the values of any group, on whatever shard they are.
                yield Component(name=name, dtype=dtype, columns=group, whole=ordered)
        if ordered:
            yield Component(name=ORDER, dtype="int32", rows=False)

    return Scheme(kind=kind, components=tuple(components()))
