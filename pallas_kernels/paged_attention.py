# SPDX-License-Identifier: Apache-2.0
"""Attention over a paged KV cache: decode rows and prompt chunks in one ragged batch.

    out[t, h] = softmax_j( f(scale * q[t, h] . K[row(t), j, h // G]) ) @ V[row(t), j, h // G],   j <= position(t)

with G = heads / kv_heads query heads per KV head, f = soft_cap * tanh(. / soft_cap) or nothing. The new
tokens' own keys and values are already in the pool (`kv_write` comes first).

    q              [tokens, heads, dim]                 float32 | bfloat16 | float16
    k_pool, v_pool [blocks, block_size, kv_heads, dim]  q's dtype, or int8 | float8_e4m3fn | float8_e5m2
    block_tables   int32 [rows, width]   block ids of each row, in order
    kv_lens        int32 [rows]          KV tokens of each row, the new ones included
    cu_q_lens      int32 [rows + 1]      row r owns the query tokens [cu_q_lens[r], cu_q_lens[r + 1])
    distribution   int32 [2]             (decode rows, rows): rows [0, decode rows) have one query token each,
                                         rows [decode rows, rows) any number, rows behind are padding

The query tokens of a row are its last ones: their positions are kv_len - q_len ... kv_len - 1. V may have
another head dim than K. Per-call options: `window` (a token sees the last `window` tokens, itself included),
`soft_cap`, `sinks` float32 [heads] (a logit per head that takes part in the softmax and has no value),
`k_scale` and `v_scale` for one-byte KV, float32 [kv_heads] or [blocks, block_size, kv_heads].

Padding: entries of padding rows are never read; table entries behind a row's length, or wholly before its
window, are never followed; slots nobody owns may hold NaN. Tokens of no row, and rows with kv_len 0, give
zeros. Accumulation, softmax and split partials are float32.

The interface follows the TPU kernel of the same kind (ragged, decode rows first), less its middle number.
"""

import numbers
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import triton as plt

from pallas_kernels import blockwise, checks, dispatch, flash, tuning
from pallas_kernels.tuning import DecodeTiles, RaggedTiles

_PROGRAMS_WANTED = 2 * 132 * 4  # two waves of four programs on each of an H200's 132 multiprocessors


def paged_attention(
    q: jax.Array,
    k_pool: jax.Array,
    v_pool: jax.Array,
    *,
    block_tables: jax.Array,
    kv_lens: jax.Array,
    cu_q_lens: jax.Array,
    distribution: jax.Array,
    scale: float | None = None,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: jax.Array | None = None,
    k_scale: jax.Array | None = None,
    v_scale: jax.Array | None = None,
    decode_only: bool = False,
    decode_tiles: DecodeTiles | None = None,
    ragged_tiles: RaggedTiles | None = None,
) -> jax.Array:
    """Returns [tokens, heads, v_dim] in q's dtype. `decode_only` promises that every row is a decode row.

    The tiles are chosen from the shapes; pass them to measure others.
    """
    q, k_pool, v_pool = (jnp.asarray(array) for array in (q, k_pool, v_pool))
    sinks, k_scale, v_scale = (None if array is None else jnp.asarray(array) for array in (sinks, k_scale, v_scale))
    _check(q, k_pool, v_pool, sinks, k_scale, v_scale, window, soft_cap, scale)
    described = dict(block_tables=block_tables, kv_lens=kv_lens, cu_q_lens=cu_q_lens, distribution=distribution)
    batch: dict[str, jax.Array] = {name: jnp.asarray(array) for name, array in described.items()}
    checks.check_ragged_call(q=q, pool=k_pool, decode_only=decode_only, **batch)
    options: dict[str, Any] = dict(
        scale=q.shape[-1] ** -0.5 if scale is None else float(scale),
        window=None if window is None else int(window),
        soft_cap=None if soft_cap is None else float(soft_cap),
        sinks=sinks,
        k_scale=k_scale,
        v_scale=v_scale,
        decode_only=decode_only,
    )
    if dispatch.implementation() == "reference":
        return reference(q, k_pool, v_pool, **batch, **options)
    return _kernel(q, k_pool, v_pool, batch=batch, **options, decode_tiles=decode_tiles, ragged_tiles=ragged_tiles)


def _check(
    q: jax.Array,
    k_pool: jax.Array,
    v_pool: jax.Array,
    sinks: jax.Array | None,
    k_scale: jax.Array | None,
    v_scale: jax.Array | None,
    window: int | None,
    soft_cap: float | None,
    scale: float | None,
) -> None:
    checks.check_rank("q", q, "tokens heads dim")
    checks.check_float("q", q)
    checks.check_kv_pools(k_pool, v_pool)
    _, heads, dim = q.shape
    kv_heads = k_pool.shape[2]
    checks.require(k_pool.shape[3] == dim, f"head dims differ: q has {dim}, k_pool has {k_pool.shape[3]}")
    checks.require(
        heads > 0 and heads % kv_heads == 0,
        f"q has {heads} heads and the pool {kv_heads} KV heads: the first must be a multiple of the second",
    )
    checks.check_kv_dtype(q.dtype, k_pool.dtype)
    checks.check_kv_scale("k_scale", k_scale, k_pool, kv_heads)
    checks.check_kv_scale("v_scale", v_scale, v_pool, kv_heads)
    checks.require(
        k_pool.dtype != jnp.int8 or (k_scale is not None and v_scale is not None),
        f"the pools are int8, k_scale is {'None' if k_scale is None else 'given'} and v_scale "
        f"{'None' if v_scale is None else 'given'}: int8 needs both",
    )
    if sinks is not None:
        checks.check_shape("sinks", sinks, (heads,), f"q has {heads} heads")
        checks.require(sinks.dtype == jnp.float32, f"sinks must be float32, got {sinks.dtype}")
    checks.check_number("scale", scale)
    checks.check_number("soft_cap", soft_cap, positive=True)
    checks.require(
        window is None or (isinstance(window, numbers.Integral) and window > 0),
        f"window is {window!r}, expected a positive whole number of tokens or None",
    )


# --- reference twin ---------------------------------------------------------------------------------------------


def reference(
    q: jax.Array,
    k_pool: jax.Array,
    v_pool: jax.Array,
    *,
    block_tables: jax.Array,
    kv_lens: jax.Array,
    cu_q_lens: jax.Array,
    distribution: jax.Array,
    scale: float,
    window: int | None,
    soft_cap: float | None,
    sinks: jax.Array | None,
    k_scale: jax.Array | None,
    v_scale: jax.Array | None,
    decode_only: bool,
) -> jax.Array:
    """The same in plain jax.numpy; what the CPU runs."""
    _, block_size, kv_heads, _ = k_pool.shape

    def take(pool: jax.Array, pool_scale: jax.Array | None, blocks: jax.Array) -> jax.Array:
        x = pool[blocks].astype(jnp.float32)  # [*blocks, block_size, kv_heads, dim]
        if pool_scale is not None:
            per_slot = pool_scale[blocks] if pool_scale.ndim == 3 else lax.expand_dims(pool_scale, range(x.ndim - 2))
            x = x * per_slot[..., None]
        return x

    def heads_first(pool: jax.Array, pool_scale: jax.Array | None, blocks: jax.Array) -> jax.Array:
        x = take(pool, pool_scale, blocks)
        return x.reshape(-1, *x.shape[2:]).transpose(1, 0, 2)

    def tokens_first(pool: jax.Array, pool_scale: jax.Array | None, blocks: jax.Array) -> jax.Array:
        return take(pool, pool_scale, blocks).reshape(len(blocks), -1, kv_heads * pool.shape[3])

    return blockwise.attend(
        q,
        block_tables=block_tables,
        kv_lens=kv_lens,
        cu_q_lens=cu_q_lens,
        distribution=distribution,
        decode_only=decode_only,
        kv_heads=kv_heads,
        value_dim=v_pool.shape[3],
        block_size=block_size,
        scale=scale,
        window=window,
        soft_cap=soft_cap,
        sinks=sinks,
        read=lambda blocks: blockwise.Chunk(heads_first(k_pool, k_scale, blocks), heads_first(v_pool, v_scale, blocks)),
        read_rows=lambda blocks: blockwise.RowChunks(
            tokens_first(k_pool, k_scale, blocks), tokens_first(v_pool, v_scale, blocks)
        ),
    )


# --- kernel -----------------------------------------------------------------------------------------------------


def _read(
    *, block_size: int, key_parts: tuple[flash.Part, ...], value_parts: tuple[flash.Part, ...], dtype: jnp.dtype
) -> flash.Read:
    def read(
        refs: flash.Refs, row: jax.Array, head_group: jax.Array, tokens: jax.Array, valid: jax.Array | None
    ) -> flash.Tile:
        block, slot = flash.locate(refs["block_tables"], row, tokens, valid, block_size=block_size)
        head = jnp.broadcast_to(head_group, tokens.shape)

        def tile(ref: Any, parts: tuple[flash.Part, ...]) -> tuple[jax.Array, ...]:
            return tuple(flash.load_rows(ref, (block, slot, head), part, valid).astype(dtype) for part in parts)

        def scale(name: str) -> jax.Array | None:
            ref = refs.get(name)
            if ref is None or ref.ndim == 1:
                return None if ref is None else ref[head_group]
            return plt.load(ref.at[block, slot, head], mask=valid, other=None if valid is None else 0)

        keys, values = tile(refs["k_pool"], key_parts), tile(refs["v_pool"], value_parts)
        return flash.Tile(keys, values, scale("k_scale"), scale("v_scale"))

    return read


def default_decode_tiles(*, rows: int, head_groups: int, group: int, dtype: jnp.dtype, dim: int) -> DecodeTiles:
    """Enough splits to fill the GPU, no more than needed: each split costs a partial output."""
    splits = max(1, min(32, -(-_PROGRAMS_WANTED // (rows * head_groups))))
    wide = group > 32  # so many heads in one program need the registers of eight warps
    if dtype == jnp.float32:  # three products each: smaller tiles, or the registers spill
        return DecodeTiles(32 if dim <= 128 else 16, splits, num_warps=8 if wide or dim > 128 else 4, num_stages=2)
    return DecodeTiles(splits=splits, num_warps=8 if wide else 4)


def default_ragged_tiles(*, group: int, dtype: jnp.dtype, dim: int) -> RaggedTiles:
    if dtype == jnp.float32:
        return RaggedTiles(64, 16, 8 if group > 64 else 4, 2) if dim <= 128 else RaggedTiles(16, 16, 8, 2)
    return RaggedTiles()


def tile_key(q: jax.Array, k_pool: jax.Array, rows: int) -> str:
    """What measured tiles are keyed by: everything that changes the compiled loop, rows by power of two."""
    return tuning.key(
        block_size=k_pool.shape[1],
        dim=q.shape[2],
        dtype=q.dtype.name,
        group=q.shape[1] // k_pool.shape[2],
        kv=k_pool.dtype.name,
        kv_heads=k_pool.shape[2],
        rows=flash.next_power_of_two(rows),
    )


def _kernel(
    q: jax.Array,
    k_pool: jax.Array,
    v_pool: jax.Array,
    *,
    batch: dict[str, jax.Array],
    scale: float,
    window: int | None,
    soft_cap: float | None,
    sinks: jax.Array | None,
    k_scale: jax.Array | None,
    v_scale: jax.Array | None,
    decode_only: bool,
    decode_tiles: DecodeTiles | None,
    ragged_tiles: RaggedTiles | None,
) -> jax.Array:
    _, heads, dim = q.shape
    _, block_size, kv_heads, v_dim = v_pool.shape
    rows = batch["kv_lens"].shape[0]
    shape: dict[str, Any] = dict(group=heads // kv_heads, dtype=q.dtype, dim=max(dim, v_dim))
    key_parts, value_parts = flash.split_parts(dim), flash.split_parts(v_dim)
    attention = flash.Flash(
        heads=heads,
        group=heads // kv_heads,
        key_parts=key_parts,
        value_parts=value_parts,
        scale=scale,
        window=window,
        soft_cap=soft_cap,
        read=_read(block_size=block_size, key_parts=key_parts, value_parts=value_parts, dtype=q.dtype),
    )
    optional = {"sinks": sinks, "k_scale": k_scale, "v_scale": v_scale}
    inputs = {
        "q": q,
        "k_pool": k_pool,
        "v_pool": v_pool,
        **batch,
        **{name: array for name, array in optional.items() if array is not None},
    }
    return flash.attention(
        attention,
        inputs,
        decode_only=decode_only,
        decode_tiles=decode_tiles
        or tuning.choose(
            "paged_decode",
            tile_key(q, k_pool, rows),
            default_decode_tiles(rows=rows, head_groups=kv_heads, **shape),
        ),
        ragged_tiles=ragged_tiles
        or tuning.choose("paged_ragged", tile_key(q, k_pool, 1), default_ragged_tiles(**shape)),
        name="paged",
    )
