# SPDX-License-Identifier: Apache-2.0
"""Matmul of a few rows with a weight of 4 or 8 bits.

    out[r] = weight @ x[r],   weight[n, k] = (codes[n, k] - zeros[n, k // group]) * scales[n, k // group]

    x       [rows, k]            bfloat16 | float16 | float32
    codes   [n, k / 2]           4 bits: int8 (codes from -8 to 7) | uint8 (0 to 15); the code of an even column is in
                                 the low half of a byte, that of the next column in the high half
            [n, k]               8 bits: int8 | float8_e4m3fn | float8_e5m2, finite
    scales  [n, k / group]       float32 | bfloat16 | float16; one group has all columns if the second axis is 1
    zeros   uint8, as scales     0 ... 15, for 4 bits only; None: 0
    out     [rows, n]            x's dtype, or `out_dtype`

A product of few rows takes the time in which the weight is read, so the kernel reads codes as they are stored, and a
program decodes a tile of them in registers (unpack.py). Accumulation is float32. Up to 32 rows, sums of products with
codes are scaled, and the result differs from exact arithmetic by float32's rounding alone. With more rows, weights are
scaled in x's dtype first. From `MOST_ROWS` on, or if `takes` says that there is no kernel for this weight, the whole
weight is decoded to x's dtype, and multiplied like any other.

The bytes of a row of codes are read as 16-bit words of four columns, or as bytes of two where groups are small, so x
is given to the kernel as [rows, place in the word, word]. XLA makes that part of the operation that computes x, unless
it is a kernel. The columns are cut among `splits` programs, whose sums are added outside; also XLA makes that part of
what follows.
"""

import functools
import math
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels import checks, dispatch, tuning
from pallas_kernels.flash import MIN_TILE, dot, next_power_of_two
from pallas_kernels.on_cpu import quant_matmul as on_cpu
from pallas_kernels.tuning import QuantTiles
from pallas_kernels.unpack import FLOAT8, Form

MOST_ROWS = 128
_LEAST_GROUP = 32
_EARLY = 64  # with tiles of so many rows, weights are scaled and not sums
_MOST_SPLITS = 32
_MULTIPROCESSORS, _MEMORY, _L2 = 132, 4.3e12, 5.5e12  # of an H200, and bytes in a second
_FLOATS16 = (jnp.bfloat16, jnp.float16)

type Factors = tuple[jax.Array, jax.Array | None]  # scales, and what unpacked codes are reduced by


def quant_matmul(
    x: jax.Array,
    codes: jax.Array,
    scales: jax.Array,
    zeros: jax.Array | None = None,
    *,
    out_dtype: Any = None,
    tiles: QuantTiles | None = None,
) -> jax.Array:
    """Returns [rows, n]. Tiles are chosen by shape; pass others to measure them."""
    x, codes, scales = (jnp.asarray(array) for array in (x, codes, scales))
    zeros = None if zeros is None else jnp.asarray(zeros)
    result = x.dtype if out_dtype is None else jnp.dtype(out_dtype)
    _check(x, codes, scales, zeros, result)
    if dispatch.implementation() == "cpu":
        return on_cpu.quant_matmul(x, codes, scales, zeros, out_dtype=result)
    if x.shape[0] > MOST_ROWS or not takes(x, codes, scales):
        weight = on_cpu.decoded(codes, scales, zeros, columns=x.shape[1]).astype(x.dtype)
        return lax.dot_general(x, weight, (((1,), (1,)), ((), ())), preferred_element_type=result)
    tiles = tiles or tuning.choose("quant_matmul", tile_key(x, codes, scales), default_tiles(x, codes))
    return _matmul(x, codes, scales, zeros, tiles).astype(result)


def takes(x: jax.Array, codes: jax.Array, scales: jax.Array) -> bool:
    """Whether there is a kernel for such arguments: activations of 16 bits, and groups that multiples of 32 columns
    divide (4 bits) or 16 columns (8 bits)."""
    least = 4 * MIN_TILE if _bits(x, codes) == 4 else MIN_TILE
    columns, group = x.shape[1], _group(x, scales)
    fits = codes.size * codes.dtype.itemsize <= checks.INT32_MAX  # the kernel's offsets
    even = columns % least == 0 and (group % least == 0 or (least % group == 0 and group >= _LEAST_GROUP))
    return x.dtype in _FLOATS16 and x.shape[0] > 0 and fits and even


def _bits(x: jax.Array, codes: jax.Array) -> int:
    return 8 if codes.shape[1] == x.shape[1] else 4


def _group(x: jax.Array, scales: jax.Array) -> int:
    return x.shape[1] // scales.shape[1]


def _check(x: jax.Array, codes: jax.Array, scales: jax.Array, zeros: jax.Array | None, out_dtype: jnp.dtype) -> None:
    checks.check_rank("x", x, "rows k")
    checks.check_rank("codes", codes, "n bytes")
    checks.check_rank("scales", scales, "n groups")
    for name, array in (("x", x), ("scales", scales)):
        checks.check_float(name, array)
    names = ", ".join(jnp.dtype(d).name for d in checks.FLOATS)
    checks.require(out_dtype in checks.FLOATS, f"out_dtype must be one of {names}, got {out_dtype}")
    columns, (n, width), groups = x.shape[1], codes.shape, scales.shape[1]
    checks.require(n > 0 and columns > 0, f"codes has shape {tuple(codes.shape)}, expected at least 1 along every axis")
    checks.require(
        width == columns or 2 * width == columns,
        f"codes has {width} bytes in a row, x has {columns} columns: expected {columns} or half of it",
    )
    kinds = (jnp.int8, jnp.uint8) if width != columns else (jnp.int8, *FLOAT8)
    names = ", ".join(jnp.dtype(d).name for d in kinds)
    checks.require(codes.dtype in kinds, f"codes of {8 * width // columns} bits must be {names}, got {codes.dtype}")
    checks.check_shape("scales", scales, (n, groups), f"[n, groups], codes has {n} rows")
    divides = groups > 0 and columns % groups == 0
    checks.require(divides, f"scales has {groups} groups, which do not divide the {columns} columns of x")
    if zeros is not None:
        checks.check_shape("zeros", zeros, tuple(scales.shape), "as scales")
        checks.require(zeros.dtype == jnp.uint8, f"zeros must be uint8, got {zeros.dtype}")
        checks.require(width != columns, "zeros are given, and codes of 8 bits take none")


# --- the kernel -------------------------------------------------------------------------------------------------


def form_of(x: jax.Array, codes: jax.Array) -> Form:
    bits = _bits(x, codes)
    return Form(codes.dtype, bits, 4 if bits == 4 else 1)


@dataclass(frozen=True)
class _How:
    """The static sizes of one kernel."""

    form: Form
    tiles: QuantTiles
    dtype: jnp.dtype  # of x
    columns: int
    group: int | None  # None: one group has all columns

    @property
    def piece(self) -> int:
        """Columns that are multiplied at a time. Matrix instructions take 16 or more in each place of words."""
        most = self.columns if self.group is None else max(self.group, self.form.places * MIN_TILE)
        return math.gcd(self.tiles.block_inner, most)

    @property
    def lanes(self) -> int:
        """Words of a piece."""
        return self.piece // self.form.places

    @property
    def pieces(self) -> int:
        return self.columns // self.piece

    @property
    def together(self) -> int:
        """Pieces of a loop step."""
        return next(each for each in (self.tiles.block_inner // self.piece, 2, 1) if self.pieces % each == 0)

    @property
    def width(self) -> int:
        """Columns of a group."""
        return self.group or self.columns

    @property
    def groups(self) -> int:
        """Groups of a piece."""
        return pl.cdiv(self.piece, self.width)

    @property
    def early(self) -> bool:
        """Whether weights are scaled, and not sums."""
        return self.group is not None and (self.groups > 1 or self.tiles.block_rows >= _EARLY)


class _Program:
    """One program of the kernel: which rows and columns it has, and its part of the sums."""

    def __init__(self, how: _How, refs: dict[str, Any], *, rows: int, width: int) -> None:
        self.how, self.refs, tiles = how, refs, how.tiles
        self.column = pl.program_id(0) * tiles.block_columns + jnp.arange(tiles.block_columns, dtype=jnp.int32)
        self.row = pl.program_id(2) * tiles.block_rows + jnp.arange(tiles.block_rows, dtype=jnp.int32)
        self.lane = jnp.arange(how.lanes, dtype=jnp.int32)
        self.row_exists = None if rows % tiles.block_rows == 0 else (self.row < rows)[None, :]
        self.column_exists = None if width % tiles.block_columns == 0 else (self.column < width)[:, None]
        self.n = self.column if self.column_exists is None else jnp.minimum(self.column, width - 1)

    def factors(self, step: jax.Array) -> list[Factors]:
        """Of each group of a step. There may be no such step: they are fetched before it is known to come."""
        how = self.how
        pieces = (jnp.minimum(step * how.together + each, how.pieces - 1) for each in range(how.together))
        return [self.factor(piece * how.piece // how.width + each) for piece in pieces for each in range(how.groups)]

    def factor(self, group: jax.Array | int) -> Factors:
        how, index = self.how, (self.n, group)
        scale = plt.load(self.refs["scales"].at[index]).astype(how.dtype if how.early else jnp.float32)
        if "zeros" not in self.refs:
            return scale, None
        less = plt.load(self.refs["zeros"].at[index]).astype(jnp.float32) + jnp.float32(how.form.bias(how.dtype))
        return scale, less.astype(how.dtype)  # a whole number, so exact

    def spread(self, values: list[jax.Array]) -> jax.Array:
        """[columns, lanes], or [columns, 1]: the value of each group for its lanes."""
        found = values[0][:, None]
        for each, value in enumerate(values[1:], 1):
            # Which lanes these are is known for each register, so that nothing is left to choose when this runs.
            first = each * self.how.lanes // self.how.groups
            found = jnp.where(self.lane[None, :] < first, found, value[:, None])
        return found

    def add(self, total: jax.Array, piece: jax.Array, known: list[Factors]) -> jax.Array:
        """The total with the products of a piece."""
        how, word = self.how, piece * self.how.lanes + self.lane
        words = plt.load(self.refs["codes"].at[self.n[:, None], word[None, :]])
        late = not how.early and how.group is not None
        scales, less = [each[0] for each in known], [each[1] for each in known if each[1] is not None]
        bias = how.form.bias(how.dtype)
        part = None if late else total
        for place in range(how.form.places):
            x = _load(self.refs["x"], (self.row[None, :], place, word[:, None]), self.row_exists)
            weight = how.form.unpack(words, place, how.dtype)
            if less:
                weight = weight - self.spread(less)
            elif bias:
                weight = weight - jnp.asarray(bias, how.dtype)
            weight = weight * self.spread(scales) if how.early else weight
            one = dot(weight, x, contract=(1, 0))
            part = one if part is None else part + one
        assert part is not None
        return total + scales[0][:, None] * part if late else part

    def sums(self, split: jax.Array, splits: int) -> jax.Array:
        """[columns, rows] in float32, over this split's share of the contracted axis."""
        how = self.how
        steps = how.pieces // how.together
        share = pl.cdiv(steps, splits)
        row_factors = [self.factor(0)] if how.group is None else []

        def advance(i: jax.Array, carry: tuple[jax.Array, list[Factors]]) -> tuple[jax.Array, list[Factors]]:
            total, known = carry
            step = split * share + i
            # Fetched a step before they are needed. Operands of products are fetched ahead by Triton itself.
            following = self.factors(step + 1) if how.group else []
            for each in range(how.together):
                mine = known[each * how.groups : (each + 1) * how.groups] if how.group else row_factors
                total = self.add(total, step * how.together + each, mine)
            return total, following

        total = jnp.zeros((how.tiles.block_columns, how.tiles.block_rows), jnp.float32)
        count = share if steps % splits == 0 else jnp.minimum(share, steps - split * share)
        known = self.factors(split * share) if how.group else []
        total, _ = lax.fori_loop(0, count, advance, (total, known))
        return total if how.group else total * row_factors[0][0][:, None]


def _kernel(refs: dict[str, Any], out_ref: Any, *, how: _How) -> None:
    splits, rows, width = out_ref.shape
    split = pl.program_id(1)
    program = _Program(how, refs, rows=rows, width=width)
    total = program.sums(split, splits)
    exists = [each for each in (program.row_exists, program.column_exists) if each is not None]
    masks = [jnp.broadcast_to(each, total.shape) for each in exists]
    target = out_ref.at[split, program.row[None, :], program.column[:, None]]
    plt.store(target, total, mask=functools.reduce(jnp.logical_and, masks) if masks else None)


def _load(ref: Any, index: tuple[Any, ...], mask: jax.Array | None) -> jax.Array:
    """`ref[index]`, zero where the mask is False."""
    if mask is None:
        return plt.load(ref.at[index])
    shape = np.broadcast_shapes(*(jnp.shape(each) for each in index))
    return plt.load(ref.at[index], mask=jnp.broadcast_to(mask, shape), other=jnp.zeros((), ref.dtype))


def _matmul(x: jax.Array, codes: jax.Array, scales: jax.Array, zeros: jax.Array | None, tiles: QuantTiles) -> jax.Array:
    """[rows, n] in float32."""
    (rows, columns), n = x.shape, codes.shape[0]
    group = None if scales.shape[1] == 1 else _group(x, scales)
    how = _How(form_of(x, codes), tiles, x.dtype, columns, group)
    places = how.form.places

    def kernel(refs: dict[str, Any], out_ref: Any) -> None:
        _kernel(refs, out_ref, how=how)

    arranged = x.reshape(rows, columns // places, places).swapaxes(1, 2)
    inputs = {"x": arranged, "codes": how.form.words(codes), "scales": scales}
    [parts] = dispatch.kernel_call(
        kernel,
        grid=(pl.cdiv(n, tiles.block_columns), tiles.splits, pl.cdiv(rows, tiles.block_rows)),
        inputs=inputs if zeros is None else inputs | {"zeros": zeros},
        outputs=[jax.ShapeDtypeStruct((tiles.splits, rows, n), jnp.float32)],
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        name="quant_matmul",
    )
    return parts[0] if tiles.splits == 1 else jnp.sum(parts, axis=0)


# --- tiles ------------------------------------------------------------------------------------------------------


def default_tiles(x: jax.Array, codes: jax.Array) -> QuantTiles:
    """Wide tiles, as each program reads all rows of x, which the L2 limits. Two warps compute by matrix instructions of
    a warp, which wait for less than those of a warp group; with more rows, these are not fast enough."""
    (rows, columns), n, bits = x.shape, codes.shape[0], _bits(x, codes)
    if rows <= 8:
        tiles, resident = QuantTiles(8, 64, 128, 1, num_warps=2, num_stages=4), 4
    elif rows <= 16:
        tiles, resident = QuantTiles(16, 128, 128 if bits == 4 else 64, 1, num_warps=2, num_stages=4), 4
    elif rows <= 32 and bits == 8:
        tiles, resident = QuantTiles(32, 128, 64, 1, num_warps=2, num_stages=4), 4
    elif rows <= 32:
        tiles, resident = QuantTiles(32, 128, 128, 1, num_warps=4, num_stages=3), 3
    else:
        tiles, resident = QuantTiles(64, 256, 64, 1, num_warps=4, num_stages=4), 2
    steps = pl.cdiv(columns, tiles.block_inner)
    each = -(-n // tiles.block_columns) * -(-rows // tiles.block_rows)
    step_bytes = tiles.block_columns * tiles.block_inner * bits / 8

    def seconds(splits: int) -> float:
        """Of a product on an H200, in which this many programs of a multiprocessor draw its share of the bandwidth. Two
        steps are for filling the pipeline; sums are read again from the L2."""
        programs = max(resident, -(-each * splits // _MULTIPROCESSORS))
        reading = (pl.cdiv(steps, splits) + 2) * programs * step_bytes * _MULTIPROCESSORS / _MEMORY
        return reading + (splits > 1) * splits * rows * n * 4 / _L2

    # Without programs that have nothing to do.
    choices = sorted({pl.cdiv(steps, pl.cdiv(steps, splits)) for splits in range(1, min(steps, _MOST_SPLITS) + 1)})
    return replace(tiles, splits=min(choices, key=seconds))


def tile_key(x: jax.Array, codes: jax.Array, scales: jax.Array) -> str:
    """The key of measured tiles: the weight, and the rows rounded up to a power of two."""
    return tuning.key(
        dtype=x.dtype.name,
        codes=codes.dtype.name,
        bits=_bits(x, codes),
        group=_group(x, scales),
        k=x.shape[1],
        n=codes.shape[0],
        rows=next_power_of_two(x.shape[0]),
    )
