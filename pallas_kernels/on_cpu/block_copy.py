# SPDX-License-Identifier: Apache-2.0
"""Block copies on CPUs: a gather and a scatter."""

import jax
import jax.numpy as jnp


def copy_blocks(pool: jax.Array, sources: jax.Array, destinations: jax.Array) -> jax.Array:
    """See `pallas_kernels.block_copy`."""
    readable = (sources >= 0) & (sources < pool.shape[0])
    return scatter_blocks(pool, gather_blocks(pool, sources), jnp.where(readable, destinations, -1))


def gather_blocks(pool: jax.Array, blocks: jax.Array) -> jax.Array:
    """See `pallas_kernels.block_copy`."""
    exists = (blocks >= 0) & (blocks < pool.shape[0])
    taken = pool[jnp.where(exists, blocks, 0)]
    return jnp.where(exists.reshape(-1, *(1,) * (pool.ndim - 1)), taken, jnp.zeros((), pool.dtype))


def scatter_blocks(pool: jax.Array, staged: jax.Array, blocks: jax.Array) -> jax.Array:
    """See `pallas_kernels.block_copy`."""
    return pool.at[jnp.where(blocks < 0, pool.shape[0], blocks)].set(staged, mode="drop")
