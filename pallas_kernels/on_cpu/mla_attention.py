# SPDX-License-Identifier: Apache-2.0
"""Latent attention on CPUs: how a chunk of latents is read for the loop in `blockwise`."""

import jax

from pallas_kernels.on_cpu import blockwise
from pallas_kernels.ragged import Ragged


def mla_attention(
    q: jax.Array,
    pool: jax.Array,
    ragged: Ragged,
    *,
    latent_dim: int,
    scale: float,
    pool_scale: jax.Array | None,
) -> jax.Array:
    """See `pallas_kernels.mla_attention`."""

    def read(blocks: jax.Array) -> blockwise.Chunk:
        latent = pool[blocks].astype(blockwise.product_dtype(q, pool))
        if pool_scale is not None:
            latent = latent * pool_scale[0]
        latent = latent.reshape(1, -1, pool.shape[2])
        return blockwise.Chunk(latent, latent[..., :latent_dim])

    attention = blockwise.AttentionCall(kv_heads=1, value_dim=latent_dim, block_size=pool.shape[1], scale=scale)
    return blockwise.attend(q, ragged, attention, read=read)
