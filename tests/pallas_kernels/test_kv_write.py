# SPDX-License-Identifier: Apache-2.0
"""KV writes, on CPUs and by the interpreted kernel, against the oracle; donation and rounding."""

from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels import dispatch, reference
from pallas_kernels.kv_write import Written, kv_write, latent_write

BLOCKS, BLOCK_SIZE, HEADS, DIM = 5, 8, 3, 40
SLOTS = [3, -1, 39, 0, 17, -5, 8]
BOTH = pytest.mark.parametrize("implementation", ["cpu", "interpret"])
LARGEST = {jnp.int8: 127.0, jnp.float8_e4m3fn: 448.0, jnp.float8_e5m2: 57344.0}


def tokens(seed: int, dtype: Any, spread: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    new = rng.standard_normal((2, len(SLOTS), HEADS, DIM)) * spread
    new[:, 1] = np.nan  # tokens that are skipped may hold anything
    return tuple(np.array(jnp.asarray(x, dtype)) for x in new)  # type: ignore[return-value]


def pools(dtype: Any) -> tuple[jax.Array, jax.Array]:
    """Pools full of ones: what is not written must stay."""
    return tuple(jnp.ones((BLOCKS, BLOCK_SIZE, HEADS, DIM), dtype) for _ in range(2))  # type: ignore[return-value]


def expect(new: np.ndarray, dtype: Any, scale: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray | None]:
    """A pool of ones and its scale after the write, by the oracle."""
    pool = np.ones((BLOCKS, BLOCK_SIZE, *new.shape[1:]), dtype)
    return reference.kv_write(pool, np.nan_to_num(new.astype(np.float32)).astype(new.dtype), SLOTS, scale=scale)


def run(implementation: dispatch.Implementation, k_pool, v_pool, k, v, **scales: Any) -> Written:
    with dispatch.use(implementation):
        return kv_write(k_pool, v_pool, jnp.asarray(k), jnp.asarray(v), jnp.asarray(SLOTS, jnp.int32), **scales)


@BOTH
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16], ids=lambda d: d.__name__)
def test_exact_copies(implementation: dispatch.Implementation, dtype: Any) -> None:
    k, v = tokens(0, dtype)
    result = run(implementation, *pools(dtype), k, v)
    for got, new in zip(result[:2], (k, v), strict=True):
        np.testing.assert_array_equal(np.asarray(got), expect(new, dtype)[0])
    assert result.k_scale is None and result.v_scale is None


@BOTH
@pytest.mark.parametrize("dtype", list(LARGEST), ids=lambda d: d.__name__)
def test_scales_per_head(implementation: dispatch.Implementation, dtype: Any) -> None:
    k, v = tokens(1, jnp.bfloat16, spread=300.0)  # the largest overflow: they must saturate, not turn NaN
    scale = np.asarray([0.5, 1.0, 2.0], np.float32)
    result = run(implementation, *pools(dtype), k, v, k_scale=jnp.asarray(scale), v_scale=jnp.asarray(scale * 2))
    for got, new, factor in zip(result[:2], (k, v), (scale, scale * 2), strict=True):
        np.testing.assert_array_equal(np.asarray(got), expect(new, dtype, factor)[0])


@BOTH
@pytest.mark.parametrize("dtype", [jnp.float8_e4m3fn, jnp.float8_e5m2], ids=lambda d: d.__name__)
def test_float8_without_scales(implementation: dispatch.Implementation, dtype: Any) -> None:
    k, v = tokens(2, jnp.float32, spread=200.0)
    result = run(implementation, *pools(dtype), k, v)
    np.testing.assert_array_equal(np.asarray(result.k_pool), expect(k, dtype)[0])


@BOTH
@pytest.mark.parametrize("dtype", list(LARGEST), ids=lambda d: d.__name__)
def test_scales_per_slot_are_made_from_the_token(implementation: dispatch.Implementation, dtype: Any) -> None:
    k, v = tokens(3, jnp.bfloat16, spread=50.0)
    k[3, 1] = 0  # a head of zeros has scale 1
    scales = [jnp.full((BLOCKS, BLOCK_SIZE, HEADS), 7.0, jnp.float32) for _ in range(2)]
    result = run(implementation, *pools(dtype), k, v, k_scale=scales[0], v_scale=scales[1])
    for got, got_scale, new in ((result.k_pool, result.k_scale, k), (result.v_pool, result.v_scale, v)):
        x = np.nan_to_num(new.astype(np.float32))
        largest = np.abs(x).max(-1)
        _, expected = expect(new, dtype, np.full((BLOCKS, BLOCK_SIZE, HEADS), 7.0, np.float32))
        np.testing.assert_array_equal(np.asarray(got_scale), expected)
        # Half a step of int8; for float8 a relative half step of its mantissa.
        back = np.asarray(got).astype(np.float32) * np.asarray(got_scale)[..., None]
        step = {jnp.int8: 0.5 / 127, jnp.float8_e4m3fn: 2.0**-4, jnp.float8_e5m2: 2.0**-3}[dtype]
        for token, slot in enumerate(SLOTS):
            if slot >= 0:
                difference = np.abs(back[slot // BLOCK_SIZE, slot % BLOCK_SIZE] - x[token])
                assert (difference <= largest[token][:, None] * step * 1.001).all()


@BOTH
@pytest.mark.parametrize("dtype", list(LARGEST), ids=lambda d: d.__name__)
def test_tiny_tokens_do_not_become_nan(implementation: dispatch.Implementation, dtype: Any) -> None:
    """Their scale would be a denormal, which may count as zero, and 0 / 0 is NaN in float8."""
    k = np.zeros((len(SLOTS), HEADS, DIM), np.float32)
    k[:, :, 0] = [1e-36, 1e-38, 2e-38]
    scale = jnp.zeros((BLOCKS, BLOCK_SIZE, HEADS), jnp.float32)
    zeros = jnp.zeros((BLOCKS, BLOCK_SIZE, HEADS, DIM), dtype)
    result = run(implementation, zeros, zeros, k, k, k_scale=scale, v_scale=scale)
    assert np.isfinite(np.asarray(result.k_pool.astype(jnp.float32))).all()


@BOTH
def test_slots_outside_of_the_pool_write_nothing(implementation: dispatch.Implementation) -> None:
    """Inside jit nothing can be raised: an id beyond the pool must not write to any block."""
    k, v = tokens(4, jnp.float32)
    slots = jnp.asarray([40, 2**31 - 1, -(2**31), 41, 400, 4000, 40000], jnp.int32)
    with dispatch.use(implementation):
        result = jax.jit(lambda *a: kv_write(*a))(*pools(jnp.float32), jnp.asarray(k), jnp.asarray(v), slots)
    np.testing.assert_array_equal(np.asarray(result.k_pool), np.ones((BLOCKS, BLOCK_SIZE, HEADS, DIM)))


@BOTH
def test_latents(implementation: dispatch.Implementation) -> None:
    rng = np.random.default_rng(5)
    new = rng.standard_normal((len(SLOTS), 48)).astype(np.float32)
    pool = np.ones((BLOCKS, BLOCK_SIZE, 48), np.float32)
    with dispatch.use(implementation):
        got = latent_write(jnp.asarray(pool), jnp.asarray(new), jnp.asarray(SLOTS, jnp.int32))
        scale = jnp.full((1,), 0.25, jnp.float32)
        narrow = latent_write(
            jnp.asarray(pool).astype(jnp.int8), jnp.asarray(new), jnp.asarray(SLOTS, jnp.int32), pool_scale=scale
        )
    new = new[:, None]  # one head
    np.testing.assert_array_equal(np.asarray(got)[:, :, None], expect(new, np.float32)[0])
    quarter = np.full(1, 0.25, np.float32)
    np.testing.assert_array_equal(np.asarray(narrow)[:, :, None], expect(new, np.int8, quarter)[0])


def test_donated_pools_are_updated_in_place() -> None:
    """The pools' memory is reused, and jit says nothing of buffers that could not be donated."""
    k, v = tokens(6, jnp.float32)
    step = jax.jit(lambda kp, vp, k, v, slots: kv_write(kp, vp, k, v, slots)[:2], donate_argnums=(0, 1))
    k_pool, v_pool = (jnp.array(p) for p in pools(jnp.float32))
    before = {k_pool.unsafe_buffer_pointer(), v_pool.unsafe_buffer_pointer()}
    new_k, new_v = step(k_pool, v_pool, jnp.asarray(k), jnp.asarray(v), jnp.asarray(SLOTS, jnp.int32))
    assert k_pool.is_deleted() and v_pool.is_deleted()
    assert {new_k.unsafe_buffer_pointer(), new_v.unsafe_buffer_pointer()} == before


@BOTH
def test_no_tokens_change_nothing(implementation: dispatch.Implementation) -> None:
    empty = jnp.zeros((0, HEADS, DIM), jnp.float32)
    with dispatch.use(implementation):
        result = kv_write(*pools(jnp.float32), empty, empty, jnp.zeros((0,), jnp.int32))
    assert np.asarray(result.k_pool).all()


def test_float8_dtypes_are_those_of_ml_dtypes() -> None:
    """The clip uses the dtype's own largest value: e4m3fn has no infinity, 448 is its largest."""
    assert float(ml_dtypes.finfo(ml_dtypes.float8_e4m3fn).max) == LARGEST[jnp.float8_e4m3fn]
    assert float(ml_dtypes.finfo(ml_dtypes.float8_e5m2).max) == LARGEST[jnp.float8_e5m2]
