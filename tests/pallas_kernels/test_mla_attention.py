# SPDX-License-Identifier: Apache-2.0
"""Latent attention, on CPUs and by the interpreted kernel, against the oracle and paged attention of one KV head."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dispatch, reference
from pallas_kernels.mla_attention import mla_attention
from pallas_kernels.paged_attention import paged_attention
from pallas_kernels.ragged import Ragged
from pallas_kernels.tuning import DecodeTiles, RaggedTiles
from tests.pallas_kernels.batches import Batch, call_jitted, error, make_batch, rounded, stored

MIXED: dict[str, Any] = dict(q_lens=[1, 1, 5, 21, 2], kv_lens=[40, 1, 5, 50, 33], decode_rows=2)
TILES: dict[str, Any] = dict(
    decode_tiles=DecodeTiles(block_kv=16, splits=2), ragged_tiles=RaggedTiles(block_rows=32, block_kv=16)
)


def latent_batch(seed: int, *, heads: int, latent: int, rope: int, dtype: Any = jnp.float32, **shape: Any) -> Batch:
    """One KV head whose values are the first columns of its keys, rounded to the dtype."""
    rng = np.random.default_rng(seed)
    batch = make_batch(rng, kv_heads=1, group=heads, dim=latent + rope, **(shape or MIXED))
    k = rounded(batch.k, dtype)
    return Batch(rounded(batch.q, dtype), k, k[..., :latent], batch.ragged)


def run(
    batch: Batch,
    implementation: dispatch.Implementation,
    *,
    dtype: Any = jnp.float32,
    decode_only: bool = False,
    **options: Any,
) -> jax.Array:
    pool = stored(batch.k[:, :, 0], dtype)

    def call(q: jax.Array, pool: jax.Array, ragged: Ragged) -> jax.Array:
        return mla_attention(q, pool, ragged, latent_dim=batch.v.shape[3], **options)

    ragged = batch.decode_only if decode_only else batch.ragged
    return call_jitted(implementation, call, stored(batch.q, dtype), pool, ragged)


def expect(batch: Batch, **options: Any) -> np.ndarray:
    pool, latent_dim = batch.k[:, :, 0], batch.v.shape[3]
    return reference.mla_attention(batch.q, pool, batch.ragged, latent_dim=latent_dim, **options)


@pytest.mark.parametrize("implementation", ["cpu", "interpret"])
@pytest.mark.parametrize("heads, latent, rope", [(4, 32, 16), (16, 64, 8), (5, 40, 0), (80, 32, 16), (128, 16, 16)])
def test_against_float64(implementation: dispatch.Implementation, heads: int, latent: int, rope: int) -> None:
    batch = latent_batch(0, heads=heads, latent=latent, rope=rope)
    got = run(batch, implementation, scale=0.2, **TILES)
    assert got.shape == (*batch.q.shape[:2], latent)
    assert error(got, expect(batch, scale=0.2)) < 2e-6
    assert not np.asarray(got)[batch.used_tokens :].any()


@pytest.mark.parametrize("dtype, tolerance", [(jnp.bfloat16, 6e-3), (jnp.float16, 8e-4)])
def test_at_deepseek_size(dtype: Any, tolerance: float) -> None:
    """512 latent and 64 rope columns, more heads than one program takes."""
    lengths: dict[str, Any] = dict(q_lens=[1, 3], kv_lens=[33, 20], decode_rows=1, block_size=32)
    batch = latent_batch(1, heads=72, latent=512, rope=64, dtype=dtype, **lengths)
    expected = expect(batch, scale=0.07)
    for implementation in ("cpu", "interpret"):
        assert error(run(batch, implementation, dtype=dtype, scale=0.07), expected) < tolerance, implementation


def test_decode_only() -> None:
    lengths: dict[str, Any] = dict(q_lens=[1, 1, 1], kv_lens=[17, 1, 48], decode_rows=3, padding_tokens=1)
    batch = latent_batch(2, heads=8, latent=32, rope=16, **lengths)
    expected = expect(batch, scale=0.2)
    for implementation in ("cpu", "interpret"):
        for splits in (1, 3):
            tiles = DecodeTiles(block_kv=16, splits=splits)
            got = run(batch, implementation, scale=0.2, decode_only=True, decode_tiles=tiles)
            assert error(got, expected) < 2e-6, (implementation, splits)


def test_equals_paged_attention_of_one_kv_head() -> None:
    batch = latent_batch(3, heads=8, latent=48, rope=16)
    q, k, v = (jnp.asarray(x, jnp.float32) for x in (batch.q, batch.k, batch.v))
    expected = paged_attention(q, k, v, batch.ragged, scale=0.2)
    np.testing.assert_allclose(np.asarray(run(batch, "cpu", scale=0.2)), np.asarray(expected), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("kv", [jnp.int8, jnp.float8_e4m3fn], ids=lambda d: d.__name__)
def test_one_byte_latents_with_a_scale(kv: Any) -> None:
    batch = latent_batch(4, heads=4, latent=32, rope=16)
    codes = jnp.asarray(np.clip(np.floor(batch.k[:, :, 0] * 30), -127, 127), jnp.float32).astype(kv)
    pool_scale = jnp.full((1,), 1 / 30, jnp.float32)
    options: dict[str, Any] = dict(latent_dim=32, scale=0.2, pool_scale=pool_scale)
    expected = reference.mla_attention(batch.q, codes, batch.ragged, **options)
    for implementation in ("cpu", "interpret"):
        with dispatch.use(implementation):
            got = mla_attention(jnp.asarray(batch.q, jnp.float32), codes, batch.ragged, **options, **TILES)
        assert error(got, expected) < 1e-5, implementation
