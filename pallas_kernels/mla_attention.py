# SPDX-License-Identifier: Apache-2.0
"""Attention over a paged latent cache (DeepSeek's MLA), in the absorbed form.

The caller folds the key projection into the query and applies the value projection after the op. So every query head
reads the same latents: a latent is the key, and its first `latent_dim` columns are the value.

    out[t, h] = softmax_j(scale * q[t, h] . C[row(t), j]) @ C[row(t), j, :latent_dim],   j <= position(t)

    q           [tokens, heads, latent_dim + rope_dim]   float32 | bfloat16 | float16
    pool        [blocks, block_size, latent_dim + rope_dim]   q's dtype, or int8 | float8_e4m3fn | float8_e5m2
    pool_scale  float32 [1], for a one-byte pool
    ragged      `Ragged`: the rows, their lengths and their blocks

Returns [tokens, heads, latent_dim] in q's dtype. `scale` has no default, because the model derives it from the
head dim before absorption, which this op does not know. Padding and accumulation are those of `paged_attention`.
"""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import checks, dispatch, flash, tuning
from pallas_kernels.on_cpu import mla_attention as on_cpu
from pallas_kernels.ragged import Ragged
from pallas_kernels.tuning import DecodeTiles, RaggedTiles

MAX_LATENT_DIM = 512
MAX_ROPE_DIM = 128
_PROGRAMS_WANTED = 132 * 2


def mla_attention(
    q: jax.Array,
    pool: jax.Array,
    ragged: Ragged,
    *,
    latent_dim: int,
    scale: float,
    pool_scale: jax.Array | None = None,
    decode_tiles: DecodeTiles | None = None,
    ragged_tiles: RaggedTiles | None = None,
) -> jax.Array:
    """Returns [tokens, heads, latent_dim]. Tiles are chosen by shape; pass them only to measure others."""
    q, pool = jnp.asarray(q), jnp.asarray(pool)
    pool_scale = None if pool_scale is None else jnp.asarray(pool_scale)
    _check(q, pool, latent_dim, pool_scale, scale)
    ragged = ragged.checked(tokens=q.shape[0], blocks=pool.shape[0], block_size=pool.shape[1])
    options: dict[str, Any] = dict(latent_dim=latent_dim, scale=float(scale), pool_scale=pool_scale)
    if dispatch.implementation() == "cpu":
        return on_cpu.mla_attention(q, pool, ragged, **options)
    return _kernel(q, pool, ragged, **options, decode_tiles=decode_tiles, ragged_tiles=ragged_tiles)


def _check(q: jax.Array, pool: jax.Array, latent_dim: int, pool_scale: jax.Array | None, scale: float) -> None:
    checks.check_rank("q", q, "tokens heads latent+rope")
    checks.check_rank("pool", pool, "blocks block_size latent+rope")
    checks.check_float("q", q)
    checks.require(
        q.shape[2] == pool.shape[2], f"latent sizes differ: q has {q.shape[2]} columns, the pool {pool.shape[2]}"
    )
    checks.check_head_dim("latent_dim", latent_dim, limit=min(MAX_LATENT_DIM, q.shape[2]))
    rope_dim = q.shape[2] - latent_dim
    checks.require(rope_dim <= MAX_ROPE_DIM, f"rope dim is {rope_dim}, the kernels take 0 to {MAX_ROPE_DIM}")
    checks.check_kv_dtype(q.dtype, pool.dtype)
    checks.check_pool("pool", pool.shape, pool.dtype)
    checks.check_number("scale", scale)
    checks.require(q.shape[1] > 0, f"q has {q.shape[1]} heads, expected at least 1")
    checks.require(
        pool.dtype != jnp.int8 or pool_scale is not None, "the pool is int8 and pool_scale is None: int8 needs a scale"
    )
    if pool_scale is not None:
        checks.check_kv_scale("pool_scale", pool_scale, pool, 1)
        checks.check_shape("pool_scale", pool_scale, (1,), "one number for the whole pool")


# --- kernel -----------------------------------------------------------------------------------------------------


def _read(*, block_size: int, key_parts: tuple[flash.DimPart, ...], values: int, dtype: jnp.dtype) -> flash.ReadTile:
    def read(
        refs: flash.Refs, row: jax.Array, head_group: jax.Array, tokens: jax.Array, valid: jax.Array | None
    ) -> flash.Tile:
        block, slot = flash.locate(refs["block_tables"], row, tokens, valid, block_size=block_size)
        keys = tuple(flash.load_rows(refs["pool"], (block, slot), part, valid).astype(dtype) for part in key_parts)
        scale = refs["pool_scale"][0] if "pool_scale" in refs else None
        return flash.Tile(keys, keys[:values], scale, scale)

    return read


def heads_per_program(heads: int, q_dtype: jnp.dtype, kv_dtype: jnp.dtype) -> int:
    """The more heads, the fewer reads of a latent, but their float32 outputs of 512 columns must fit the registers."""
    if q_dtype == jnp.float32:
        return min(heads, 16)
    return min(heads, 32 if checks.is_one_byte(kv_dtype) else 64)


def default_decode_tiles(*, rows: int, heads: int, q_dtype: jnp.dtype, kv_dtype: jnp.dtype) -> DecodeTiles:
    """Small tiles, as latents are wide (1152 bytes per token in bfloat16), and as many splits as fill the GPU."""
    programs = rows * -(-heads // heads_per_program(heads, q_dtype, kv_dtype))
    splits = max(1, min(32, -(-_PROGRAMS_WANTED // programs)))
    if q_dtype == jnp.float32:
        return DecodeTiles(block_kv=16, splits=splits, num_warps=8, num_stages=1)
    wide = heads > 16 or checks.is_one_byte(kv_dtype)  # with conversion to do as well, four warps spill
    return DecodeTiles(block_kv=32, splits=splits, num_warps=8 if wide else 4, num_stages=2)


def default_ragged_tiles(*, q_dtype: jnp.dtype, kv_dtype: jnp.dtype) -> RaggedTiles:
    if q_dtype == jnp.float32:
        return RaggedTiles(block_rows=16, block_kv=16, num_warps=8, num_stages=1)
    if checks.is_one_byte(kv_dtype):
        return RaggedTiles(block_rows=32, block_kv=32, num_warps=8, num_stages=2)
    return RaggedTiles(block_rows=64, block_kv=16, num_warps=8, num_stages=2)


def tile_key(q: jax.Array, pool: jax.Array, rows: int) -> str:
    return tuning.key(
        block_size=pool.shape[1],
        dim=q.shape[2],
        dtype=q.dtype.name,
        heads=q.shape[1],
        kv=pool.dtype.name,
        rows=flash.next_power_of_two(rows),
    )


def _kernel(
    q: jax.Array,
    pool: jax.Array,
    ragged: Ragged,
    *,
    latent_dim: int,
    scale: float,
    pool_scale: jax.Array | None,
    decode_tiles: DecodeTiles | None,
    ragged_tiles: RaggedTiles | None,
) -> jax.Array:
    heads, dim = q.shape[1:]
    rows = ragged.max_rows
    dtypes = {"q_dtype": q.dtype, "kv_dtype": pool.dtype}
    value_parts = flash.split_parts(latent_dim)
    key_parts = value_parts + flash.split_parts(dim - latent_dim, start=latent_dim)
    attention = flash.Flash(
        heads=heads,
        group=heads_per_program(heads, **dtypes),
        key_parts=key_parts,
        value_parts=value_parts,
        scale=scale,
        window=None,
        soft_cap=None,
        read=_read(block_size=pool.shape[1], key_parts=key_parts, values=len(value_parts), dtype=q.dtype),
    )
    inputs = {"q": q, "pool": pool, **ragged.arrays()}
    if pool_scale is not None:
        inputs["pool_scale"] = pool_scale
    return flash.attention(
        attention,
        inputs,
        decode_only=ragged.decode_only,
        decode_tiles=decode_tiles
        or tuning.choose("mla_decode", tile_key(q, pool, rows), default_decode_tiles(rows=rows, heads=heads, **dtypes)),
        ragged_tiles=ragged_tiles or tuning.choose("mla_ragged", tile_key(q, pool, 1), default_ragged_tiles(**dtypes)),
        name="mla",
    )
