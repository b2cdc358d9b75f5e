# SPDX-License-Identifier: Apache-2.0
"""The attention loop on GPUs: online softmax over paged KV, shared by paged and latent attention (Triton dialect).

It divides query rows and KV tiles among programs, applies the masks, and splits long KV (split-KV). It does not know
what a block holds: an op passes `read`, which loads one tile of keys and values.

1. `decode`  one program per (row, head group, split), for rows with one query token. The KV is cut into `splits`
             ranges; each gives a float32 partial output and its log-sum-exp.
2. `combine` one program per (row, head): merges the splits.
3. `ragged`  one program per (tile of query tokens, head group), for rows with any number of query tokens.

A program works on M "tile rows", pairs of a query token and a head of the group, so that heads that share KV also
share its loads. Head dims are cut into power-of-two parts (192 = 128 + 64), each with its own matmul. Softmax runs in
base 2 and float32; matmuls accumulate in float32.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels import dispatch
from pallas_kernels.tuning import DecodeTiles, RaggedTiles

LOG2E = 1.4426950408889634
# Used as minus infinity; it is finite so that NEG - NEG is 0 and not NaN.
NEG = -1e30
MIN_TILE = 16  # smallest side of a tensor core's tile


class DimPart(NamedTuple):
    """A power-of-two slice of the head dim: columns [start, start + width), of which `valid` exist."""

    start: int
    width: int
    valid: int


class Tile(NamedTuple):
    """Keys and values of some KV tokens, as `read` returns them."""

    keys: tuple[jax.Array, ...]  # [tokens, width] per key part
    values: tuple[jax.Array, ...]  # [tokens, width] per value part
    key_scale: jax.Array | None  # scalar or [tokens]
    value_scale: jax.Array | None


class State(NamedTuple):
    """Running softmax of M tile rows: maximum and sum in base 2, unnormalized output per value part."""

    maximum: jax.Array
    total: jax.Array
    outputs: tuple[jax.Array, ...]


type Refs = dict[str, Any]
# read(refs, row, head_group, tokens [N], valid [N] or None) -> Tile
type ReadTile = Callable[[Refs, jax.Array, jax.Array, jax.Array, jax.Array | None], Tile]


@dataclass(frozen=True)
class Flash:
    """The static options of one attention call."""

    heads: int  # query heads
    group: int  # query heads that one program handles together
    key_parts: tuple[DimPart, ...]
    value_parts: tuple[DimPart, ...]
    scale: float
    window: int | None
    soft_cap: float | None
    read: ReadTile

    @property
    def head_groups(self) -> int:
        return -(-self.heads // self.group)

    @property
    def value_dim(self) -> int:
        return sum(part.valid for part in self.value_parts)


def split_parts(dim: int, start: int = 0) -> tuple[DimPart, ...]:
    """Cut a head dim into power-of-two parts, the largest first; the last may be padded.

    Parts narrower than 32 cost more registers than they save work (112 as 64 + 32 + 16 spilled in decode), so the
    remainder is padded instead: 96 = 64 + 32, 192 = 128 + 64, but 80 = 64 + 16 of 32 and 112 = 112 of 128.
    """
    parts = []
    while dim > 0:
        width = max(32 if parts else MIN_TILE, next_power_of_two(dim))
        if width > 32 and dim < width * 7 / 8:
            width //= 2
        parts.append(DimPart(start, width, min(width, dim)))
        start, dim = start + width, dim - width
    return tuple(parts)


def next_power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def part_columns(part: DimPart) -> tuple[jax.Array, jax.Array | None]:
    """Column indices of a part and, if it is padded, the mask of columns that exist."""
    column = jnp.arange(part.width, dtype=jnp.int32)
    return part.start + column, None if part.valid == part.width else column < part.valid


def _address(
    ref: Any, index: Sequence[jax.Array], part: DimPart, valid: jax.Array | None
) -> tuple[Any, jax.Array | None]:
    """`ref[*index, part]`, where each index has one id per row, and the mask of what exists; None means all."""
    columns, exists = part_columns(part)
    rows = index[0].shape[0]
    masks = [] if valid is None else [valid[:, None]]
    masks += [] if exists is None else [exists[None, :]]
    mask = None
    for m in masks:
        wide = jnp.broadcast_to(m, (rows, part.width))
        mask = wide if mask is None else mask & wide
    return ref.at[(*(i[:, None] for i in index), columns[None, :])], mask


def load_rows(ref: Any, index: Sequence[jax.Array], part: DimPart, valid: jax.Array | None) -> jax.Array:
    """Load a part of one row per index entry, [rows, width], with zeros where nothing exists."""
    where, mask = _address(ref, index, part, valid)
    # A typed zero, as an integer cannot be cast to a one-byte float.
    return plt.load(where, mask=mask, other=None if mask is None else jnp.zeros((), ref.dtype))


def store_rows(ref: Any, index: Sequence[jax.Array], part: DimPart, value: jax.Array, valid: jax.Array) -> None:
    where, mask = _address(ref, index, part, valid)
    plt.store(where, value.astype(ref.dtype), mask=mask)


def locate(
    block_tables: Any, row: jax.Array, tokens: jax.Array, valid: jax.Array | None, *, block_size: int
) -> tuple[jax.Array, jax.Array]:
    """Block id and slot of each token of a row; block 0 if the token is not valid."""
    shift = block_size.bit_length() - 1  # block sizes are powers of two
    block = plt.load(
        block_tables.at[jnp.broadcast_to(row, tokens.shape), tokens >> shift],
        mask=valid,
        other=None if valid is None else 0,
    )
    return block, tokens & (block_size - 1)


def _float32_precision() -> lax.PrecisionLike:
    """Three tf32 products have about the precision of float32 and run on tensor cores; plain float32 products do not,
    and spill. The interpreter runs on the CPU, which has no tf32."""
    if dispatch.implementation() == "kernel":
        return lax.DotAlgorithmPreset.TF32_TF32_F32_X3
    return lax.Precision.HIGHEST


def dot(a: jax.Array, b: jax.Array, *, contract: tuple[int, int]) -> jax.Array:
    """Matmul with float32 accumulation; float32 operands are not rounded to tf32."""
    return lax.dot_general(
        a,
        b,
        (((contract[0],), (contract[1],)), ((), ())),
        precision=_float32_precision() if a.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )


def _scale_rows(x: jax.Array, scale: jax.Array | None) -> jax.Array:
    """Multiply the columns of x by a scale, a scalar or one number per column."""
    if scale is None:
        return x
    return x * (scale[None, :] if scale.ndim else scale)


def _attend(
    flash: Flash,
    refs: Refs,
    state: State,
    query: Sequence[jax.Array],
    *,
    row: jax.Array,
    head_group: jax.Array,
    start: jax.Array,
    stop: jax.Array,
    block_kv: int,
    positions: jax.Array | None,
    masked: bool,
) -> State:
    """Fold KV tokens [start, stop) into the state, `block_kv` at a time.

    `positions` [M] are the positions of the tile rows, for the causal and window masks; None if every row sees every
    token of the range. `masked=False` promises that no mask is needed and that stop - start is a multiple of block_kv.
    """

    def step(i: jax.Array, state: State) -> State:
        tokens = start + i * block_kv + jnp.arange(block_kv, dtype=jnp.int32)
        exists = tokens < stop
        tile = flash.read(refs, row, head_group, tokens, exists if masked else None)
        products = [dot(q, k, contract=(1, 1)) for q, k in zip(query, tile.keys, strict=True)]
        scores = _scale_rows(functools.reduce(jnp.add, products), tile.key_scale)
        if flash.soft_cap is None:
            scores = scores * (flash.scale * LOG2E)
        else:
            scores = jnp.tanh(scores * (flash.scale / flash.soft_cap)) * (flash.soft_cap * LOG2E)
        if masked:
            visible = jnp.broadcast_to(exists[None, :], scores.shape)
            if positions is not None:
                visible = visible & (tokens[None, :] <= positions[:, None])
                if flash.window is not None:
                    visible = visible & (tokens[None, :] > positions[:, None] - flash.window)
            scores = jnp.where(visible, scores, NEG)
        maximum = jnp.maximum(state.maximum, jnp.max(scores, axis=1))
        rescale = jnp.exp2(state.maximum - maximum)
        weights = jnp.exp2(scores - maximum[:, None])
        total = state.total * rescale + jnp.sum(weights, axis=1)
        weights = _scale_rows(weights, tile.value_scale).astype(tile.values[0].dtype)
        outputs = tuple(
            out * rescale[:, None] + dot(weights, v, contract=(1, 0))
            for out, v in zip(state.outputs, tile.values, strict=True)
        )
        return State(maximum, total, outputs)

    return lax.fori_loop(0, pl.cdiv(jnp.maximum(stop - start, 0), block_kv), step, state)


def _initial_state(flash: Flash, refs: Refs, heads: jax.Array, owns_sink: jax.Array) -> State:
    """An empty softmax, or one that has folded in the attention sink (a logit per head without a value)."""
    rows = heads.shape[0]
    maximum = jnp.full((rows,), NEG, jnp.float32)
    total = jnp.zeros((rows,), jnp.float32)
    if "sinks" in refs:
        here = jnp.broadcast_to(owns_sink, (rows,)) & (heads < flash.heads)
        sink = plt.load(refs["sinks"].at[heads], mask=here, other=0) * LOG2E
        maximum = jnp.where(here, sink, maximum)
        total = jnp.where(here, 1.0, total)
    return State(maximum, total, tuple(jnp.zeros((rows, p.width), jnp.float32) for p in flash.value_parts))


def _normalised(state: State) -> tuple[jax.Array, ...]:
    """Outputs divided by the softmax sum; a row that folded in no token gives zeros."""
    inverse = 1.0 / jnp.where(state.total > 0, state.total, 1.0)
    return tuple(out * inverse[:, None] for out in state.outputs)


def _decode_kernel(refs: Refs, *out_refs: Any, flash: Flash, tiles: DecodeTiles, fill: bool) -> None:
    row, head_group, split = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    active = row < refs["distribution"][0]

    def program() -> None:
        length = jnp.where(active, refs["kv_lens"][row], 0)
        first = jnp.int32(0) if flash.window is None else jnp.maximum(length - flash.window, 0)
        per_split = pl.cdiv(pl.cdiv(length - first, tiles.block_kv), tiles.splits) * tiles.block_kv
        start = first + split * per_split
        stop = jnp.minimum(start + per_split, length)

        member = jnp.arange(max(MIN_TILE, next_power_of_two(flash.group)), dtype=jnp.int32)
        heads = head_group * flash.group + member
        valid = (member < flash.group) & (heads < flash.heads)
        token = jnp.broadcast_to(row, heads.shape)
        query = [load_rows(refs["q"], (token, heads), part, valid) for part in flash.key_parts]
        state = _attend(
            flash,
            refs,
            _initial_state(flash, refs, heads, (split == 0) & (length > 0)),
            query,
            row=row,
            head_group=head_group,
            start=start,
            stop=stop,
            block_kv=tiles.block_kv,
            positions=None,  # the one query token is the last: it sees every token of the range
            masked=True,
        )
        outputs = _normalised(state)
        if tiles.splits == 1:
            for part, out in zip(flash.value_parts, outputs, strict=True):
                store_rows(out_refs[0], (token, heads), part, out, valid)
            return
        seen = state.total > 0
        index = (jnp.broadcast_to(split, heads.shape), token, heads)
        for part, out in zip(flash.value_parts, outputs, strict=True):
            store_rows(out_refs[0], index, part, out, valid & seen)
        lse = jnp.where(seen, state.maximum + jnp.log2(jnp.where(seen, state.total, 1.0)), NEG)
        plt.store(out_refs[1].at[index], lse, mask=valid)

    if fill:
        program()
    else:
        pl.when(active)(program)


def _combine_kernel(refs: Refs, out_ref: Any, *, flash: Flash, splits: int, fill: bool) -> None:
    row, head = pl.program_id(0), pl.program_id(1)
    active = row < refs["distribution"][0]

    def program() -> None:
        split = jnp.arange(max(2, next_power_of_two(splits)), dtype=jnp.int32)
        where = (split, jnp.broadcast_to(row, split.shape), jnp.broadcast_to(head, split.shape))
        lse = plt.load(refs["lse"].at[where], mask=split < splits, other=NEG)
        seen = lse > NEG / 2
        weight = jnp.where(seen, jnp.exp2(lse - jnp.max(lse)), 0.0)
        total = jnp.sum(weight)
        weight = weight / jnp.where(total > 0, total, 1.0)
        for part in flash.value_parts:
            partial = load_rows(refs["partial"], where, part, seen)  # a split without tokens wrote nothing
            merged = jnp.sum(partial * weight[:, None], axis=0)
            columns, exists = part_columns(part)
            plt.store(out_ref.at[row, head, columns], merged.astype(out_ref.dtype), mask=exists)

    if fill:
        program()
    else:
        pl.when(active)(program)


def decode(
    flash: Flash,
    inputs: dict[str, jax.Array],
    *,
    tiles: DecodeTiles,
    name: str,
    into: jax.Array | None,
) -> jax.Array:
    """Attention of the decode rows [0, distribution[0]); the query of row b is token b.

    With `into`, the result is written into that array in place, and its other tokens are kept. Without it, the output
    has one token per row, and zeros for rows that are not decode rows.
    """
    q, rows = inputs["q"], inputs["kv_lens"].shape[0]
    fill = into is None
    final = jax.ShapeDtypeStruct((rows if into is None else into.shape[0], flash.heads, flash.value_dim), q.dtype)
    grid = (rows, flash.head_groups, tiles.splits)
    aliased = {} if into is None else {"into": into}
    aliases = {} if into is None else {"into": 0}

    def kernel(refs: Refs, *out_refs: Any) -> None:
        _decode_kernel(refs, *out_refs, flash=flash, tiles=tiles, fill=fill)

    def combine(refs: Refs, out_ref: Any) -> None:
        _combine_kernel(refs, out_ref, flash=flash, splits=tiles.splits, fill=fill)

    if tiles.splits == 1:
        return dispatch.kernel_call(
            kernel,
            grid=grid,
            inputs=inputs | aliased,
            outputs=[final],
            aliases=aliases,
            num_warps=tiles.num_warps,
            num_stages=tiles.num_stages,
            name=name,
        )[0]
    partial, lse = dispatch.kernel_call(
        kernel,
        grid=grid,
        inputs=inputs,
        outputs=[
            jax.ShapeDtypeStruct((tiles.splits, rows, flash.heads, flash.value_dim), jnp.float32),
            jax.ShapeDtypeStruct((tiles.splits, rows, flash.heads), jnp.float32),
        ],
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        name=name,
    )
    return dispatch.kernel_call(
        combine,
        grid=(rows, flash.heads),
        inputs={"partial": partial, "lse": lse, "distribution": inputs["distribution"]} | aliased,
        outputs=[final],
        aliases=aliases,
        num_warps=2,
        num_stages=1,
        name=f"{name}_combine",
    )[0]


def _ragged_kernel(refs: Refs, out_ref: Any, *, flash: Flash, tiles: RaggedTiles, per_tile: int) -> None:
    # Late tiles of a causal row have the most work: start them first.
    tile = pl.num_programs(0) - 1 - pl.program_id(0)
    head_group = pl.program_id(1)
    starts, decode_rows, rows = refs["cu_q_lens"], refs["distribution"][0], refs["distribution"][1]

    # Row s begins at tile cu[s] // per_tile + s, which leaves every row room for its last, partly filled tile. The
    # tokens after the last row are treated as another row without KV, so they get zeros.
    def halve(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds
        middle = (low + high) // 2
        before = starts[middle] // per_tile + middle <= tile
        return jnp.where(before, middle, low), jnp.where(before, high, middle)

    steps = refs["kv_lens"].shape[0].bit_length() + 1
    row, _ = lax.fori_loop(0, steps, halve, (jnp.int32(0), rows + 1))
    first_token = starts[row]
    is_padding = row >= rows
    end_token = jnp.where(is_padding, refs["q"].shape[0], starts[jnp.minimum(row + 1, rows)])
    offset = (tile - (first_token // per_tile + row)) * per_tile

    @pl.when((row >= decode_rows) & (first_token + offset < end_token))
    def _() -> None:
        count = end_token - first_token
        kv_len = jnp.where(is_padding, 0, refs["kv_lens"][jnp.minimum(row, refs["kv_lens"].shape[0] - 1)])
        index = jnp.arange(tiles.block_rows, dtype=jnp.int32)
        query_index, heads = offset + index // flash.group, head_group * flash.group + index % flash.group
        valid = (index < per_tile * flash.group) & (query_index < count) & (heads < flash.heads)
        token = first_token + query_index
        positions = kv_len - count + query_index
        query = [load_rows(refs["q"], (token, heads), part, valid) for part in flash.key_parts]
        state = _initial_state(flash, refs, heads, kv_len > 0)

        first_position = kv_len - count + offset  # of the tile
        stop = jnp.minimum(kv_len, first_position + per_tile)
        shared = dict(row=jnp.minimum(row, refs["kv_lens"].shape[0] - 1), head_group=head_group)
        if flash.window is None:
            # Every row of the tile sees the tokens up to its first position: no masks needed.
            full = jnp.maximum(first_position + 1, 0) // tiles.block_kv * tiles.block_kv
            full = jnp.minimum(full, kv_len // tiles.block_kv * tiles.block_kv)
            state = _attend(
                flash,
                refs,
                state,
                query,
                start=jnp.int32(0),
                stop=full,
                block_kv=tiles.block_kv,
                positions=None,
                masked=False,
                **shared,
            )
        else:
            full = jnp.maximum(first_position - flash.window + 1, 0)
        state = _attend(
            flash,
            refs,
            state,
            query,
            start=full,
            stop=stop,
            block_kv=tiles.block_kv,
            positions=positions,
            masked=True,
            **shared,
        )
        for part, out in zip(flash.value_parts, _normalised(state), strict=True):
            store_rows(out_ref, (token, heads), part, out, valid)


def ragged(flash: Flash, inputs: dict[str, jax.Array], *, tiles: RaggedTiles, name: str) -> jax.Array:
    """Attention of the rows [distribution[0], distribution[1]), and zeros for the tokens after the last row.

    The tokens of decode rows are not written: `decode(..., into=...)` does that.
    """
    q, rows = inputs["q"], inputs["kv_lens"].shape[0]
    block_rows = max(tiles.block_rows, MIN_TILE, next_power_of_two(flash.group))
    per_tile = block_rows // flash.group
    tiles = RaggedTiles(block_rows, tiles.block_kv, tiles.num_warps, tiles.num_stages)

    def kernel(refs: Refs, out_ref: Any) -> None:
        _ragged_kernel(refs, out_ref, flash=flash, tiles=tiles, per_tile=per_tile)

    return dispatch.kernel_call(
        kernel,
        grid=(q.shape[0] // per_tile + rows + 1, flash.head_groups),
        inputs=inputs,
        outputs=[jax.ShapeDtypeStruct((q.shape[0], flash.heads, flash.value_dim), q.dtype)],
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        name=name,
    )[0]


def attention(
    flash: Flash,
    inputs: dict[str, jax.Array],
    *,
    decode_only: bool,
    decode_tiles: DecodeTiles,
    ragged_tiles: RaggedTiles,
    name: str,
) -> jax.Array:
    """Attention of a whole batch: first the ragged rows, then the decode rows into the same array."""
    out = None if decode_only else ragged(flash, inputs, tiles=ragged_tiles, name=f"{name}_ragged")
    return decode(flash, inputs, tiles=decode_tiles, name=f"{name}_decode", into=out)
