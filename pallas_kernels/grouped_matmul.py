# SPDX-License-Identifier: Apache-2.0
"""Matmul of rows sorted by group, each group with its own matrix, as a mixture of experts needs it.

    out[r] = rhs[g(r)] @ lhs[r],   group g owns the rows [group_offsets[g], group_offsets[g + 1])

    lhs            [rows, k]           float32 | bfloat16 | float16
    rhs            [groups, n, k]      lhs's dtype; output-major, as checkpoints store weights
    group_offsets  int32 [groups + 1]  non-decreasing, within 0 ... rows
    out            [rows, n]           lhs's dtype, or `out_dtype`

Rows before group_offsets[0] and rows from group_offsets[groups] on belong to no group; a device that holds only some
experts leaves the rows of the others out in this way. Such rows give zeros, and their lhs may hold NaN. A group may
own all rows or none, which is common in decode; the weights of a group without rows are never read. Shapes are static
and offsets are data: inside jit, invalid offsets give wrong rows but touch no memory outside the arrays. Accumulation
is float32.

Supports reverse-mode gradients with respect to lhs and rhs, without transposing rhs in memory. The incoming gradient
is rounded to lhs's dtype. Rows of no group and groups without rows get zeros.
"""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels import checks, dispatch, tuning
from pallas_kernels.flash import MIN_TILE, dot, next_power_of_two
from pallas_kernels.on_cpu import grouped_matmul as on_cpu
from pallas_kernels.tuning import MatmulTiles

_PROGRAMS_WANTED = 2 * 132  # two programs on each of an H200's multiprocessors
_ROWS_TOGETHER = 1024  # programs of this many rows share weights through the L2 before the next columns follow


def grouped_matmul(
    lhs: jax.Array,
    rhs: jax.Array,
    group_offsets: jax.Array,
    *,
    out_dtype: Any = None,
    tiles: MatmulTiles | None = None,
) -> jax.Array:
    """Returns [rows, n]. Tiles are chosen by shape, assuming that every row belongs to a group; pass others if few do,
    or to measure them. They apply to this product; its gradients choose their own."""
    lhs, rhs, group_offsets = (jnp.asarray(array) for array in (lhs, rhs, group_offsets))
    result = lhs.dtype if out_dtype is None else jnp.dtype(out_dtype)
    _check(lhs, rhs, group_offsets, result)
    return _product(lhs, rhs, group_offsets, _how(lhs, rhs, False, result, tiles))


def _check(lhs: jax.Array, rhs: jax.Array, group_offsets: jax.Array, out_dtype: jnp.dtype) -> None:
    checks.check_rank("lhs", lhs, "rows k")
    checks.check_rank("rhs", rhs, "groups n k")
    checks.check_float("lhs", lhs)
    checks.require(rhs.dtype == lhs.dtype, f"lhs is {lhs.dtype} and rhs {rhs.dtype}, expected one dtype")
    names = ", ".join(jnp.dtype(d).name for d in checks.FLOATS)
    checks.require(out_dtype in checks.FLOATS, f"out_dtype must be one of {names}, got {out_dtype}")
    rows, k = lhs.shape
    groups = rhs.shape[0]
    checks.require(min(rhs.shape) > 0, f"rhs has shape {tuple(rhs.shape)}, expected at least 1 along every axis")
    checks.require(rhs.shape[2] == k, f"lhs has rows of {k}, rhs of {rhs.shape[2]}: expected the same (its last axis)")
    checks.check_shape("group_offsets", group_offsets, (groups + 1,), f"groups + 1, rhs has {groups} groups")
    checks.check_int32("group_offsets", group_offsets)
    checks.require(rows <= checks.INT32_MAX, f"lhs has {rows} rows, offsets are int32: at most {checks.INT32_MAX}")
    for name, array in (("lhs", lhs), ("rhs", rhs)):
        checks.check_offsets(name, array.shape, array.dtype)
    if checks.is_concrete(group_offsets):
        check_group_offsets(np.asarray(group_offsets), rows=rows)


def check_group_offsets(group_offsets: np.ndarray, *, rows: int) -> None:
    """Check that offsets are within the rows and do not decrease."""
    offsets = group_offsets.astype(np.int64)
    checks.require(int(offsets[0]) >= 0, f"group_offsets starts at {int(offsets[0])}, expected 0 or more")
    bad = np.flatnonzero(np.diff(offsets) < 0)
    checks.require(
        bad.size == 0,
        f"group_offsets falls at group {bad[:1]}: {offsets[bad[:1]]} then {offsets[bad[:1] + 1]}, it must not fall",
    )
    checks.require(
        int(offsets[-1]) <= rows, f"group_offsets ends at {int(offsets[-1])}, but lhs has {rows} rows: at most that"
    )


# --- gradients --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _How:
    """The static options of one product."""

    transposed: bool  # contract rhs's n instead of its k
    out_dtype: jnp.dtype
    tiles: MatmulTiles | None  # None on CPUs
    implementation: dispatch.Implementation  # kept for the gradient, which may be traced under another choice


def _how(
    lhs: jax.Array, rhs: jax.Array, transposed: bool, out_dtype: jnp.dtype, tiles: MatmulTiles | None = None
) -> _How:
    implementation = dispatch.implementation()
    if implementation == "cpu":
        return _How(transposed, out_dtype, None, implementation)
    (rows, inner), groups, width = lhs.shape, rhs.shape[0], rhs.shape[2 if transposed else 1]
    tiles = tiles or tuning.choose(
        "grouped_matmul",
        tile_key(lhs, rhs, transposed),
        default_tiles(rows=rows, groups=groups, inner=inner, width=width, dtype=lhs.dtype),
    )
    return _How(transposed, out_dtype, tiles, implementation)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _product(lhs: jax.Array, rhs: jax.Array, offsets: jax.Array, how: _How) -> jax.Array:
    with dispatch.use(how.implementation):
        if how.tiles is None:
            return on_cpu.grouped_matmul(lhs, rhs, offsets, transposed=how.transposed, out_dtype=how.out_dtype)
        return _matmul(lhs, rhs, offsets, transposed=how.transposed, out_dtype=how.out_dtype, tiles=how.tiles)


def _forward(lhs: jax.Array, rhs: jax.Array, offsets: jax.Array, how: _How) -> tuple[jax.Array, Any]:
    return _product(lhs, rhs, offsets, how), (lhs, rhs, offsets)


def _backward(how: _How, kept: Any, d_out: jax.Array) -> tuple[Any, Any, Any]:
    lhs, rhs, offsets = kept
    d_out = d_out.astype(lhs.dtype)
    pair = (lhs, d_out) if how.transposed else (d_out, lhs)
    with dispatch.use(how.implementation):
        d_lhs = _product(d_out, rhs, offsets, _how(d_out, rhs, not how.transposed, lhs.dtype))
        d_rhs = (on_cpu.grouped_outer if how.tiles is None else _outer)(*pair, offsets)
    return d_lhs, d_rhs, np.zeros(offsets.shape, jax.dtypes.float0)


_product.defvjp(_forward, _backward)


# --- kernels ----------------------------------------------------------------------------------------------------


def row_tile_count(rows: int, groups: int, block_rows: int) -> int:
    """The most tiles that `row_tiles` can need: each group, and the rows before and after them, may end in a part."""
    parts = min(rows, groups + 2)
    return (rows - parts) // block_rows + parts


def row_tiles(offsets: jax.Array, rows: int, block_rows: int) -> jax.Array:
    """int32 [3, tiles]: group, first row and end of each tile of at most `block_rows` rows of one group.

    Rows of no group have tiles too, of group -1, which write their zeros. Unused tiles come last and are empty. Sums
    over masks replace a scan, a search and gathers, because XLA compiles them into two kernels.
    """
    groups, shift = offsets.shape[0] - 1, block_rows.bit_length() - 1  # a power of two
    bounds = jnp.clip(jnp.pad(offsets, (1, 1), constant_values=(0, rows)), 0, rows)
    begin, end = bounds[:-1], bounds[1:]
    needed = (jnp.maximum(end - begin, 0) + block_rows - 1) >> shift
    part = jnp.arange(groups + 2, dtype=jnp.int32)
    before = jnp.sum(jnp.where(part[None, :] < part[:, None], needed[None, :], 0), axis=1, dtype=jnp.int32)
    group = jnp.where(part <= groups, part - 1, -1)

    tile = jnp.arange(row_tile_count(rows, groups, block_rows), dtype=jnp.int32)[:, None]
    own = (before[None, :] <= tile) & (tile < (before + needed)[None, :])
    first = begin[None, :] + ((tile - before[None, :]) << shift)
    stop = jnp.minimum(first + block_rows, end[None, :])
    found = (jnp.broadcast_to(group[None, :], own.shape), first, stop)
    return jnp.sum(jnp.where(own[None], jnp.stack(found), 0), axis=2, dtype=jnp.int32)


def _load(ref: Any, index: tuple[Any, ...], *masks: jax.Array | None) -> jax.Array:
    """`ref[index]`, zero where a mask is False; a mask that is None is True everywhere."""
    known = [m for m in masks if m is not None]
    if not known:
        return plt.load(ref.at[index])
    shape = np.broadcast_shapes(*(jnp.shape(i) for i in index))
    mask = functools.reduce(jnp.logical_and, (jnp.broadcast_to(m, shape) for m in known))
    return plt.load(ref.at[index], mask=mask, other=jnp.zeros((), ref.dtype))


def _kernel(refs: dict[str, Any], out_ref: Any, *, tiles: MatmulTiles, transposed: bool) -> None:
    lhs, rhs = refs["lhs"], refs["rhs"]
    inner_dim, width = lhs.shape[1], out_ref.shape[1]
    row_tile_total, column_tiles = refs["row_tiles"].shape[1], pl.cdiv(width, tiles.block_columns)
    # Programs of neighbouring row tiles and the same columns run at the same time, as they read the same weights.
    together = max(1, _ROWS_TOGETHER // tiles.block_rows)
    program = pl.program_id(0)
    chunk = program // (together * column_tiles)
    height = jnp.minimum(row_tile_total - chunk * together, together)
    place = program - chunk * together * column_tiles
    tile, column_tile = chunk * together + place % height, place // height
    group, first, stop = (refs["row_tiles"][i, tile] for i in range(3))

    row = first + jnp.arange(tiles.block_rows, dtype=jnp.int32)
    column = column_tile * tiles.block_columns + jnp.arange(tiles.block_columns, dtype=jnp.int32)
    exists = None if width % tiles.block_columns == 0 else (column < width)
    stored = jnp.broadcast_to((row < stop)[:, None], (tiles.block_rows, tiles.block_columns))
    stored = stored if exists is None else stored & jnp.broadcast_to(exists[None, :], stored.shape)
    target = out_ref.at[row[:, None], column[None, :]]

    @pl.when((first < stop) & (group < 0))
    def _() -> None:
        plt.store(target, jnp.zeros(stored.shape, out_ref.dtype), mask=stored)

    @pl.when((first < stop) & (group >= 0))
    def _() -> None:
        readable = jnp.minimum(row, stop - 1)  # stays in the group, so that no NaN of other rows comes in

        def step(i: jax.Array | int, total: jax.Array, *, masked: bool = False) -> jax.Array:
            inner = i * tiles.block_inner + jnp.arange(tiles.block_inner, dtype=jnp.int32)
            within = inner < inner_dim if masked else None
            x = _load(lhs, (readable[:, None], inner[None, :]), None if within is None else within[None, :])
            if transposed:
                index = (group, inner[:, None], column[None, :])
                masks = (None if within is None else within[:, None], None if exists is None else exists[None, :])
            else:
                index = (group, column[:, None], inner[None, :])
                masks = (None if within is None else within[None, :], None if exists is None else exists[:, None])
            return total + dot(x, _load(rhs, index, *masks), contract=(1, 0 if transposed else 1))

        total = jnp.zeros(stored.shape, jnp.float32)
        whole, rest = divmod(inner_dim, tiles.block_inner)
        total = lax.fori_loop(0, whole, step, total) if whole else total
        total = step(whole, total, masked=True) if rest else total
        plt.store(target, total.astype(out_ref.dtype), mask=stored)


def default_tiles(*, rows: int, groups: int, inner: int, width: int, dtype: jnp.dtype) -> MatmulTiles:
    """Room for twice the rows of an average group, so that most groups fit in one tile and are read once.

    With few rows, reading the weights is what takes the time, and narrow tiles make enough programs to fill the GPU.
    With many rows, wide tiles use each value that they load in more products.
    """
    block_rows = min(128, max(MIN_TILE, next_power_of_two(-(-2 * rows // groups))))
    if dtype == jnp.float32:  # a product is three tf32 products: with larger tiles the registers spill
        tiles = MatmulTiles(min(block_rows, 64), 64, 32, num_warps=4, num_stages=3)
    elif block_rows == 128:
        tiles = MatmulTiles(128, 256, 64, num_warps=8, num_stages=3)
    elif block_rows == 64:
        tiles = MatmulTiles(64, 128, 64, num_warps=4, num_stages=4)
    else:
        tiles = MatmulTiles(block_rows, 64, 64, num_warps=4, num_stages=4)
    columns, depth, warps = tiles.block_columns, tiles.block_inner, tiles.num_warps
    columns = min(columns, max(MIN_TILE, next_power_of_two(width)))
    row_tile_total = row_tile_count(rows, groups, tiles.block_rows)
    while columns > 32 and row_tile_total * pl.cdiv(width, columns) < _PROGRAMS_WANTED:
        columns, depth = columns // 2, min(depth * 2, 256)
    while depth > 32 and inner % depth:  # a masked remainder costs a step: prefer a depth that divides
        depth //= 2
    if inner % depth:
        depth = min(tiles.block_inner, max(MIN_TILE, next_power_of_two(inner)))
    return MatmulTiles(tiles.block_rows, columns, depth, warps, tiles.num_stages)


def tile_key(lhs: jax.Array, rhs: jax.Array, transposed: bool) -> str:
    """The key of measured tiles: the matrices, and the rows rounded up to a power of two."""
    groups, n, k = rhs.shape
    return tuning.key(
        dtype=rhs.dtype.name,
        groups=groups,
        k=k,
        n=n,
        rows=next_power_of_two(lhs.shape[0]),
        transposed=int(transposed),
    )


def _matmul(
    lhs: jax.Array,
    rhs: jax.Array,
    offsets: jax.Array,
    *,
    transposed: bool,
    out_dtype: jnp.dtype,
    tiles: MatmulTiles,
) -> jax.Array:
    rows, width = lhs.shape[0], rhs.shape[2 if transposed else 1]
    out = jax.ShapeDtypeStruct((rows, width), out_dtype)
    if rows == 0:
        return jnp.zeros(out.shape, out.dtype)
    described = row_tiles(offsets, rows, tiles.block_rows)

    def kernel(refs: dict[str, Any], out_ref: Any) -> None:
        _kernel(refs, out_ref, tiles=tiles, transposed=transposed)

    return dispatch.kernel_call(
        kernel,
        grid=(described.shape[1] * pl.cdiv(width, tiles.block_columns),),
        inputs={"lhs": lhs, "rhs": rhs, "row_tiles": described},
        outputs=[out],
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        name="grouped_matmul_t" if transposed else "grouped_matmul",
    )[0]


def _outer_kernel(refs: dict[str, Any], out_ref: Any, *, tiles: MatmulTiles) -> None:
    a, b = refs["a"], refs["b"]
    n, k = out_ref.shape[1:]
    k_tiles = pl.cdiv(k, tiles.block_columns)
    program, group = pl.program_id(0), pl.program_id(1)
    begin, end = refs["offsets"][group], refs["offsets"][group + 1]
    n_index = program // k_tiles * tiles.block_rows + jnp.arange(tiles.block_rows, dtype=jnp.int32)
    k_index = program % k_tiles * tiles.block_columns + jnp.arange(tiles.block_columns, dtype=jnp.int32)
    n_exists, k_exists = n_index < n, k_index < k

    def step(i: jax.Array, total: jax.Array) -> jax.Array:
        row = begin + i * tiles.block_inner + jnp.arange(tiles.block_inner, dtype=jnp.int32)
        own = (row < end)[:, None]
        x = _load(a, (row[:, None], n_index[None, :]), own, n_exists[None, :])
        y = _load(b, (row[:, None], k_index[None, :]), own, k_exists[None, :])
        return total + dot(x, y, contract=(0, 0))

    steps = pl.cdiv(jnp.maximum(end - begin, 0), tiles.block_inner)
    total = lax.fori_loop(0, steps, step, jnp.zeros((tiles.block_rows, tiles.block_columns), jnp.float32))
    stored = jnp.broadcast_to(n_exists[:, None], total.shape) & jnp.broadcast_to(k_exists[None, :], total.shape)
    plt.store(out_ref.at[group, n_index[:, None], k_index[None, :]], total.astype(out_ref.dtype), mask=stored)


def _outer(a: jax.Array, b: jax.Array, offsets: jax.Array) -> jax.Array:
    """`on_cpu.grouped_outer` as a kernel, with one choice of tiles: it is not tuned for training."""
    rows, groups = a.shape[0], offsets.shape[0] - 1
    n, k = a.shape[1], b.shape[1]
    out = jax.ShapeDtypeStruct((groups, n, k), a.dtype)
    if rows == 0:
        return jnp.zeros(out.shape, out.dtype)
    tiles = MatmulTiles(64, 64, 32, 4, 2) if a.dtype == jnp.float32 else MatmulTiles(128, 128, 64, 8, 3)

    def kernel(refs: dict[str, Any], out_ref: Any) -> None:
        _outer_kernel(refs, out_ref, tiles=tiles)

    return dispatch.kernel_call(
        kernel,
        grid=(pl.cdiv(n, tiles.block_rows) * pl.cdiv(k, tiles.block_columns), groups),
        inputs={"a": a, "b": b, "offsets": jnp.clip(offsets, 0, rows)},
        outputs=[out],
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        name="grouped_outer",
    )[0]
