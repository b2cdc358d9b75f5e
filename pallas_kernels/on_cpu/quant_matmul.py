# SPDX-License-Identifier: Apache-2.0
"""Products with weights of 4 or 8 bits on CPUs: the weight is decoded and multiplied a few rows at a time."""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.on_cpu.matmul import matmul

_DECODED = 1 << 19  # values that are decoded at a time, so that they stay in the processor's cache


def quant_matmul(
    x: jax.Array, codes: jax.Array, scales: jax.Array, zeros: jax.Array | None, *, out_dtype: jnp.dtype
) -> jax.Array:
    """See `pallas_kernels.quant_matmul`."""
    (rows, columns), n = x.shape, codes.shape[0]
    wide = x.astype(jnp.float32)
    count = min(n, max(1, _DECODED // columns))

    def some(first: jax.Array | int) -> jax.Array:
        def cut(array: jax.Array) -> jax.Array:
            return lax.dynamic_slice_in_dim(array, first, count)

        weight = decoded(cut(codes), cut(scales), None if zeros is None else cut(zeros), columns=columns)
        # Without the barrier, XLA decodes the weight inside of the product, once per use of a value.
        return matmul(wide, lax.optimization_barrier(weight))

    def step(i: jax.Array, out: jax.Array) -> jax.Array:
        first = jnp.minimum(i * count, n - count)  # the last rows may be computed twice
        return lax.dynamic_update_slice_in_dim(out, some(first), first, axis=1)

    if count == n:
        return some(0).astype(out_dtype)
    return lax.fori_loop(0, -(-n // count), step, jnp.zeros((rows, n), jnp.float32)).astype(out_dtype)


def decoded(codes: jax.Array, scales: jax.Array, zeros: jax.Array | None, *, columns: int) -> jax.Array:
    """The weight [n, columns] in float32."""
    n, groups = scales.shape
    if codes.shape[1] == columns:
        values = codes.astype(jnp.float32)
    else:
        # A signed shift to the right copies the sign, an unsigned one fills with zeros.
        low = jnp.right_shift(jnp.left_shift(codes, codes.dtype.type(4)), codes.dtype.type(4))
        high = jnp.right_shift(codes, codes.dtype.type(4))
        values = jnp.stack((low, high), axis=-1).astype(jnp.float32)
    values = values.reshape(n, groups, columns // groups)
    values = values if zeros is None else values - zeros.astype(jnp.float32)[..., None]
    return (values * scales.astype(jnp.float32)[..., None]).reshape(n, columns)
