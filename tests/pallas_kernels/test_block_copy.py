# SPDX-License-Identifier: Apache-2.0
"""Block copies, on CPUs and by the interpreted kernel, against the oracle, for every dtype of a pool."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import dispatch, reference
from pallas_kernels.block_copy import copy_blocks, gather_blocks, scatter_blocks
from tests.pallas_kernels.batches import stored

BOTH = pytest.mark.parametrize("implementation", ["cpu", "interpret"])
DTYPES = [jnp.float32, jnp.bfloat16, jnp.float16, jnp.int8, jnp.float8_e4m3fn, jnp.float8_e5m2]


def pool_of(dtype: Any, shape: tuple[int, ...] = (6, 8, 2, 70)) -> np.ndarray:
    values = np.random.default_rng(0).integers(-100, 100, shape)
    return stored(values, dtype)


def ids(*values: int) -> jax.Array:
    return jnp.asarray(values, jnp.int32)


@BOTH
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: d.__name__)
def test_copy_gather_scatter(implementation: dispatch.Implementation, dtype: Any) -> None:
    pool = pool_of(dtype)
    with dispatch.use(implementation):
        copied = copy_blocks(jnp.asarray(pool), ids(1, -1, 2, 3), ids(4, 5, -1, 0))
        staged = gather_blocks(jnp.asarray(pool), ids(5, -1, 0))
        back = scatter_blocks(jnp.asarray(pool), jnp.asarray(pool[:3]), ids(4, -1, 5))
    np.testing.assert_array_equal(np.asarray(copied), reference.copy_blocks(pool, [1, -1, 2, 3], [4, 5, -1, 0]))
    np.testing.assert_array_equal(np.asarray(staged), reference.gather_blocks(pool, [5, -1, 0]))
    np.testing.assert_array_equal(np.asarray(back), reference.scatter_blocks(pool, pool[:3], [4, -1, 5]))


@BOTH
@pytest.mark.parametrize("shape", [(4, 8), (3, 16, 576), (3, 256, 4, 16), (5, 8, 3)])
def test_any_block_shape(implementation: dispatch.Implementation, shape: tuple[int, ...]) -> None:
    """K and V, latents and per-slot scales; blocks of more and of less than one program's chunk."""
    pool = pool_of(jnp.float32, shape)
    with dispatch.use(implementation):
        got = copy_blocks(jnp.asarray(pool), ids(0), ids(2))
    expected = pool.copy()
    expected[2] = pool[0]
    np.testing.assert_array_equal(np.asarray(got), expected)


@settings(max_examples=6)
@given(st.permutations(range(6)), st.integers(1, 3))
def test_random_moves(order: list[int], count: int) -> None:
    """Any disjoint sources and destinations; a round trip through staging gives the pool back."""
    pool = pool_of(jnp.float32)
    sources, destinations = order[:count], order[3 : 3 + count]
    expected = pool.copy()
    expected[destinations] = pool[sources]
    for implementation in ("cpu", "interpret"):
        with dispatch.use(implementation):
            got = copy_blocks(jnp.asarray(pool), ids(*sources), ids(*destinations))
            staged = gather_blocks(jnp.asarray(pool), ids(*order))
            rebuilt = scatter_blocks(jnp.zeros_like(staged), staged, ids(*order))
        np.testing.assert_array_equal(np.asarray(got), expected)
        np.testing.assert_array_equal(np.asarray(rebuilt), pool)


@BOTH
def test_ids_outside_of_the_pool_move_nothing(implementation: dispatch.Implementation) -> None:
    pool = jnp.asarray(pool_of(jnp.float32))
    with dispatch.use(implementation):
        copied = jax.jit(copy_blocks)(pool, ids(0, 6, 10**9), ids(6, 1, 10**9))
        staged = jax.jit(gather_blocks)(pool, ids(6, 10**9))
        back = jax.jit(scatter_blocks)(pool, jnp.zeros_like(pool[:2]), ids(6, 10**9))
    np.testing.assert_array_equal(np.asarray(copied), np.asarray(pool))
    np.testing.assert_array_equal(np.asarray(staged), np.zeros((2, *pool.shape[1:])))
    np.testing.assert_array_equal(np.asarray(back), np.asarray(pool))


def test_a_donated_pool_is_updated_in_place() -> None:
    pool = jnp.asarray(pool_of(jnp.float32))
    pool = jnp.array(pool)
    where = pool.unsafe_buffer_pointer()
    moved = jax.jit(copy_blocks, donate_argnums=0)(pool, ids(0), ids(3))
    assert pool.is_deleted() and moved.unsafe_buffer_pointer() == where
