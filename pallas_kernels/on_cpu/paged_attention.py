# SPDX-License-Identifier: Apache-2.0
"""Paged attention on CPUs: how a chunk of blocks is read for the loop in `blockwise`."""

import jax
from jax import lax

from pallas_kernels.on_cpu import blockwise
from pallas_kernels.ragged import Ragged


def paged_attention(
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
) -> jax.Array:
    """See `pallas_kernels.paged_attention`."""
    _, block_size, kv_heads, _ = k_pool.shape
    dtype = blockwise.product_dtype(q, k_pool)

    def take(pool: jax.Array, pool_scale: jax.Array | None, blocks: jax.Array) -> jax.Array:
        # Blocks that are gathered as rows of a matrix take half the time, but then XLA copies pools in some programs.
        x = pool[blocks].astype(dtype)  # [*blocks, block_size, kv_heads, dim]
        if pool_scale is not None:
            per_slot = pool_scale[blocks] if pool_scale.ndim == 3 else lax.expand_dims(pool_scale, range(x.ndim - 2))
            x = x * per_slot[..., None]
        return x

    def heads_first(pool: jax.Array, pool_scale: jax.Array | None, blocks: jax.Array) -> jax.Array:
        x = take(pool, pool_scale, blocks)
        return x.reshape(-1, *x.shape[2:]).transpose(1, 0, 2)

    def tokens_first(pool: jax.Array, pool_scale: jax.Array | None, blocks: jax.Array) -> jax.Array:
        return take(pool, pool_scale, blocks).reshape(len(blocks), -1, kv_heads * pool.shape[3])

    attention = blockwise.AttentionCall(
        kv_heads=kv_heads,
        value_dim=v_pool.shape[3],
        block_size=block_size,
        scale=scale,
        window=window,
        soft_cap=soft_cap,
        sinks=sinks,
    )
    return blockwise.attend(
        q,
        ragged,
        attention,
        read=lambda blocks: blockwise.Chunk(heads_first(k_pool, k_scale, blocks), heads_first(v_pool, v_scale, blocks)),
        read_rows=lambda blocks: blockwise.RowChunks(
            tokens_first(k_pool, k_scale, blocks), tokens_first(v_pool, v_scale, blocks)
        ),
    )
