# SPDX-License-Identifier: Apache-2.0
"""How float values are stored in one byte (int8, float8) with a scale; the kernel and the CPU code share it."""

import jax
import jax.numpy as jnp


def largest(dtype: jnp.dtype) -> float:
    """Largest magnitude of a one-byte dtype; int8 is used symmetrically."""
    return 127.0 if dtype == jnp.int8 else float(jnp.finfo(dtype).max)


def encode(x: jax.Array, scale: jax.Array | None, dtype: jnp.dtype) -> jax.Array:
    """x / scale as the dtype stores it. Casts to float8 do not saturate, so clip first."""
    if scale is not None:
        x = x / scale
    x = jnp.clip(x, -largest(dtype), largest(dtype))
    return (jnp.floor(x + 0.5) if dtype == jnp.int8 else x).astype(dtype)


def scale_of(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """The scale that maps the largest magnitude along the last axis to the dtype's; 1 if all values are zero.

    It is also 1 if the scale would be a denormal: processors may treat that as zero, and 0 / 0 is NaN.
    """
    # Times the reciprocal: some compilers turn a division by a constant into that and some do not.
    scale = jnp.max(jnp.abs(x), axis=-1) * (1.0 / largest(dtype))
    return jnp.where(scale >= jnp.finfo(jnp.float32).tiny, scale, 1.0)
