# SPDX-License-Identifier: Apache-2.0
"""KV writes on CPUs: one scatter per pool."""

import jax
import jax.numpy as jnp

from pallas_kernels import checks
from pallas_kernels.one_byte import encode, scale_of


def kv_write(
    pool: jax.Array, new: jax.Array, scale: jax.Array | None, slots: jax.Array
) -> tuple[jax.Array, jax.Array | None]:
    """One pool [blocks, block_size, heads, dim] and its scale after the write; see `pallas_kernels.kv_write`."""
    blocks, block_size = pool.shape[:2]
    # JAX would count a negative index from the end, but drops one past the end.
    target = jnp.where(slots < 0, blocks * block_size, slots)

    def put(into: jax.Array, values: jax.Array) -> jax.Array:
        flat = into.reshape(blocks * block_size, *into.shape[2:])
        return flat.at[target].set(values, mode="drop", unique_indices=False).reshape(into.shape)

    if not checks.is_one_byte(pool.dtype):
        return put(pool, new), None
    x = new.astype(jnp.float32)
    if scale is None or scale.ndim == 1:
        return put(pool, encode(x, None if scale is None else scale[None, :, None], pool.dtype)), scale
    per_slot = scale_of(x, pool.dtype)
    return put(pool, encode(x, per_slot[..., None], pool.dtype)), put(scale, per_slot)
