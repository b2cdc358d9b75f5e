# SPDX-License-Identifier: Apache-2.0
"""Attention over a paged KV cache, for decode rows and prompt chunks in one ragged batch.

    out[t, h] = softmax_j( f(scale * q[t, h] . K[row(t), j, h // G]) ) @ V[row(t), j, h // G],   j <= position(t)

with G = heads / kv_heads query heads per KV head, and f(x) = soft_cap * tanh(x / soft_cap), or x without a soft cap.
Call `kv_write` first: the keys and values of the new tokens must be in the pool.

    q              [tokens, heads, dim]                 float32 | bfloat16 | float16
    k_pool, v_pool [blocks, block_size, kv_heads, dim]  q's dtype, or int8 | float8_e4m3fn | float8_e5m2
    ragged         `Ragged`: the rows, their lengths and their blocks

The head dim of V may differ from that of K. Options: `window` (a token sees the last `window` tokens, including
itself), `soft_cap`, `sinks` float32 [heads] (a logit per head that takes part in the softmax and has no value), and
for one-byte KV `k_scale` and `v_scale`, float32 [kv_heads] or [blocks, block_size, kv_heads].

Slots that no row uses may hold NaN. Tokens that belong to no row, and rows with kv_len 0, give zeros. Softmax,
accumulation and the partial results of splits are float32.

The interface follows JAX's ragged paged attention for TPUs, but `distribution` has two numbers instead of three.
"""

import numbers
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton as plt

from pallas_kernels import checks, dispatch, flash, tuning
from pallas_kernels.on_cpu import paged_attention as on_cpu
from pallas_kernels.ragged import Ragged
from pallas_kernels.tuning import DecodeTiles, RaggedTiles

_PROGRAMS_WANTED = 2 * 132 * 4  # two waves of four programs on each of an H200's 132 multiprocessors


def paged_attention(
    q: jax.Array,
    k_pool: jax.Array,
    v_pool: jax.Array,
    ragged: Ragged,
    *,
    scale: float | None = None,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: jax.Array | None = None,
    k_scale: jax.Array | None = None,
    v_scale: jax.Array | None = None,
    decode_tiles: DecodeTiles | None = None,
    ragged_tiles: RaggedTiles | None = None,
) -> jax.Array:
    """Returns [tokens, heads, v_dim] in q's dtype. Tiles are chosen by shape; pass them only to measure others."""
    q, k_pool, v_pool = (jnp.asarray(array) for array in (q, k_pool, v_pool))
    sinks, k_scale, v_scale = (None if array is None else jnp.asarray(array) for array in (sinks, k_scale, v_scale))
    _check(q, k_pool, v_pool, sinks, k_scale, v_scale, window, soft_cap, scale)
    ragged = ragged.checked(tokens=q.shape[0], blocks=k_pool.shape[0], block_size=k_pool.shape[1])
    options: dict[str, Any] = dict(
        scale=q.shape[-1] ** -0.5 if scale is None else float(scale),
        window=None if window is None else int(window),
        soft_cap=None if soft_cap is None else float(soft_cap),
        sinks=sinks,
        k_scale=k_scale,
        v_scale=v_scale,
    )
    if dispatch.implementation() == "cpu":
        return on_cpu.paged_attention(q, k_pool, v_pool, ragged, **options)
    return _kernel(q, k_pool, v_pool, ragged, **options, decode_tiles=decode_tiles, ragged_tiles=ragged_tiles)


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
        f"q has {heads} heads and the pool {kv_heads} KV heads: heads must be a multiple of KV heads",
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


# --- kernel -----------------------------------------------------------------------------------------------------


def _read(
    *, block_size: int, key_parts: tuple[flash.DimPart, ...], value_parts: tuple[flash.DimPart, ...], dtype: jnp.dtype
) -> flash.ReadTile:
    def read(
        refs: flash.Refs, row: jax.Array, head_group: jax.Array, tokens: jax.Array, valid: jax.Array | None
    ) -> flash.Tile:
        block, slot = flash.locate(refs["block_tables"], row, tokens, valid, block_size=block_size)
        head = jnp.broadcast_to(head_group, tokens.shape)

        def tile(ref: Any, parts: tuple[flash.DimPart, ...]) -> tuple[jax.Array, ...]:
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
    """As many splits as fill the GPU and no more: each split costs a partial output."""
    splits = max(1, min(32, -(-_PROGRAMS_WANTED // (rows * head_groups))))
    wide = group > 32  # that many heads in one program need the registers of eight warps
    if dtype == jnp.float32:  # a product is three tf32 products: with larger tiles the registers spill
        return DecodeTiles(32 if dim <= 128 else 16, splits, num_warps=8 if wide or dim > 128 else 4, num_stages=2)
    return DecodeTiles(splits=splits, num_warps=8 if wide else 4)


def default_ragged_tiles(*, group: int, dtype: jnp.dtype, dim: int) -> RaggedTiles:
    if dtype == jnp.float32:
        return RaggedTiles(64, 16, 8 if group > 64 else 4, 2) if dim <= 128 else RaggedTiles(16, 16, 8, 2)
    return RaggedTiles()


def tile_key(q: jax.Array, k_pool: jax.Array, rows: int) -> str:
    """The key of measured tiles: all that changes the compiled loop, and the rows rounded up to a power of two."""
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
    ragged: Ragged,
    *,
    scale: float,
    window: int | None,
    soft_cap: float | None,
    sinks: jax.Array | None,
    k_scale: jax.Array | None,
    v_scale: jax.Array | None,
    decode_tiles: DecodeTiles | None,
    ragged_tiles: RaggedTiles | None,
) -> jax.Array:
    _, heads, dim = q.shape
    _, block_size, kv_heads, v_dim = v_pool.shape
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
        **ragged.arrays(),
        **{name: array for name, array in optional.items() if array is not None},
    }
    return flash.attention(
        attention,
        inputs,
        decode_only=ragged.decode_only,
        decode_tiles=decode_tiles
        or tuning.choose(
            "paged_decode",
            tile_key(q, k_pool, ragged.max_rows),
            default_decode_tiles(rows=ragged.max_rows, head_groups=kv_heads, **shape),
        ),
        ragged_tiles=ragged_tiles
        or tuning.choose("paged_ragged", tile_key(q, k_pool, 1), default_ragged_tiles(**shape)),
        name="paged",
    )
