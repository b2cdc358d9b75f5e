# SPDX-License-Identifier: Apache-2.0
"""Matmul of rows by group on CPUs: a loop over the groups that own rows, and over tiles of their rows."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.flash import next_power_of_two
from pallas_kernels.on_cpu.matmul import matmul


def grouped_matmul(
    lhs: jax.Array, rhs: jax.Array, offsets: jax.Array, *, transposed: bool, out_dtype: jnp.dtype
) -> jax.Array:
    """See `pallas_kernels.grouped_matmul`; `transposed` contracts n of rhs instead of k."""

    def pick(g: jax.Array) -> jax.Array:
        return lax.dynamic_index_in_dim(rhs, g, keepdims=False)

    shape = (rhs.shape[0], rhs.shape[2 if transposed else 1])
    return grouped_matmul_by(pick, lhs, offsets, shape=shape, transposed=transposed, out_dtype=out_dtype)


def grouped_matmul_by(
    pick: Callable[[jax.Array], jax.Array],
    lhs: jax.Array,
    offsets: jax.Array,
    *,
    shape: tuple[int, int],
    transposed: bool = False,
    out_dtype: jnp.dtype,
) -> jax.Array:
    """The same with weights that `pick(group)` computes, once for each group that owns rows; `shape` is [groups, n]."""
    rows, (groups, width) = lhs.shape[0], shape

    def group(g: jax.Array, begin: jax.Array, end: jax.Array, out: jax.Array) -> jax.Array:
        weight = pick(g)

        def tile(at: jax.Array, owned: jax.Array, out: jax.Array) -> jax.Array:
            size = owned.shape[0]
            x = lax.dynamic_slice_in_dim(lhs, at, size)
            y = matmul(x, weight.T if transposed else weight)
            before = lax.dynamic_slice_in_dim(out, at, size)
            return lax.dynamic_update_slice_in_dim(out, jnp.where(owned[:, None], y.astype(out_dtype), before), at, 0)

        return _fold_tiles(tile, begin, end, rows, groups, out)

    return _fold_groups(group, offsets, rows, jnp.zeros((rows, width), out_dtype))


def grouped_outer(a: jax.Array, b: jax.Array, offsets: jax.Array) -> jax.Array:
    """The sum of a[r] b[r]^T over the rows of each group: [groups, n, k], in a's dtype."""
    rows, groups = a.shape[0], offsets.shape[0] - 1

    def group(g: jax.Array, begin: jax.Array, end: jax.Array, out: jax.Array) -> jax.Array:
        def tile(at: jax.Array, owned: jax.Array, total: jax.Array) -> jax.Array:
            x, y = (
                jnp.where(owned[:, None], lax.dynamic_slice_in_dim(m, at, owned.shape[0]).astype(jnp.float32), 0.0)
                for m in (a, b)
            )
            return total + lax.dot_general(x, y, (((0,), (0,)), ((), ())))

        total = _fold_tiles(tile, begin, end, rows, groups, jnp.zeros(out.shape[1:], jnp.float32))
        return lax.dynamic_update_index_in_dim(out, total.astype(out.dtype), g, 0)

    return _fold_groups(group, offsets, rows, jnp.zeros((groups, a.shape[1], b.shape[1]), a.dtype))


def _fold_groups(
    step: Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array],
    offsets: jax.Array,
    rows: int,
    carry: jax.Array,
) -> jax.Array:
    """carry = step(group, first row, end row, carry) for each group that owns rows."""
    if rows == 0:
        return carry
    offsets = jnp.clip(offsets, 0, rows)
    owners = offsets[1:] > offsets[:-1]
    (group,) = jnp.nonzero(owners, size=owners.shape[0], fill_value=0)

    def one(i: jax.Array, carry: jax.Array) -> jax.Array:
        g = group[i].astype(jnp.int32)
        return step(g, offsets[g], offsets[g + 1], carry)

    return lax.fori_loop(0, jnp.sum(owners, dtype=jnp.int32), one, carry)


def _fold_tiles(
    step: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
    begin: jax.Array,
    end: jax.Array,
    rows: int,
    groups: int,
    carry: jax.Array,
) -> jax.Array:
    """carry = step(first row, which rows of the tile belong to the group, carry) for tiles of a group's average size.

    A second loop with larger tiles would make XLA copy the group's weights before it multiplies them.
    """
    size = min(rows, 64, max(8, next_power_of_two(-(-rows // groups))))

    def one(i: jax.Array, carry: jax.Array) -> jax.Array:
        first = begin + i * size
        at = jnp.minimum(first, rows - size)  # JAX would shift a slice that does not fit
        row = at + jnp.arange(size, dtype=jnp.int32)
        return step(at, (row >= first) & (row < end), carry)

    return lax.fori_loop(0, (end - begin + size - 1) // size, one, carry)
