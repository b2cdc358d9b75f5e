# SPDX-License-Identifier: Apache-2.0
"""The ops as callers use them: with numpy arrays, and inside of shard_map over several devices."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from pallas_kernels import dispatch, reference
from pallas_kernels.block_copy import copy_blocks, gather_blocks, scatter_blocks
from pallas_kernels.kv_write import kv_write, latent_write
from pallas_kernels.mla_attention import mla_attention
from pallas_kernels.paged_attention import paged_attention
from pallas_kernels.ragged import Ragged
from pallas_kernels.sampling import RowParams, sample, token_logprobs
from tests.pallas_kernels.batches import error, make_batch

BOTH = pytest.mark.parametrize("implementation", ["cpu", "interpret"])
MIXED: dict[str, Any] = dict(q_lens=[1, 1, 5, 9], kv_lens=[40, 1, 5, 30], decode_rows=2)
F32 = np.float32


@BOTH
def test_numpy_arrays_are_accepted(implementation: dispatch.Implementation) -> None:
    """Every argument may be a numpy array."""
    batch = make_batch(np.random.default_rng(0), **MIXED, dim=16)
    q: Any = batch.q.astype(F32)
    k: Any = batch.k.astype(F32)
    v: Any = batch.v.astype(F32)
    latent_q: Any = np.ones((batch.q.shape[0], 4, 32), F32)
    latents: Any = np.zeros((*batch.k.shape[:2], 32), F32)
    pool: Any = np.zeros((4, 8, 2, 16), F32)
    new: Any = np.ones((2, 2, 16), F32)
    slots: Any = np.array([3, 9], np.int32)
    ids: Any = np.array([0, 1], np.int32)
    logits: Any = np.eye(2, 8, dtype=F32)
    numbers: Any = [np.zeros(2, F32), np.zeros(2, np.int32), np.ones(2, F32), np.zeros(2, F32)]
    numbers += [np.zeros(2, np.uint32), ids]
    with dispatch.use(implementation):
        out = paged_attention(q, k, v, batch.ragged)
        scale: Any = np.float32(0.1)
        mla_attention(latent_q, latents, batch.ragged, latent_dim=16, scale=scale)
        assert float(kv_write(pool, pool, new, new, slots).k_pool.sum()) == new.sum()
        latent_write(latents, latent_q[:2, 0], slots)
        copy_blocks(pool, ids, ids + 2)
        scatter_blocks(pool, gather_blocks(pool, ids), ids)
        tokens: Any = sample(logits, RowParams(*numbers)).tokens
        given: Any = np.asarray(tokens)
        token_logprobs(logits, given)
    assert error(out, reference.paged_attention(batch.q, batch.k, batch.v, batch.ragged)) < 2e-6
    assert np.asarray(tokens).tolist() == [0, 1]


@BOTH
def test_heads_over_four_devices(implementation: dispatch.Implementation) -> None:
    """As in tensor parallelism: pools and queries are split by head, and each device runs its share."""
    batch = make_batch(np.random.default_rng(1), **MIXED, kv_heads=4, group=2, dim=16)
    mesh = jax.make_mesh((4,), ("tensor",), devices=jax.devices()[:4])
    heads, pool = P(None, "tensor", None), P(None, None, "tensor", None)

    @jax.jit
    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(heads, pool, pool, P()), out_specs=heads, check_vma=False)
    def attend(q: jax.Array, k: jax.Array, v: jax.Array, ragged: Ragged) -> jax.Array:
        with dispatch.use(implementation):
            return paged_attention(q, k, v, ragged)

    arrays = (
        jax.device_put(jnp.asarray(x, jnp.float32), jax.NamedSharding(mesh, spec))
        for x, spec in ((batch.q, heads), (batch.k, pool), (batch.v, pool))
    )
    assert (
        error(attend(*arrays, batch.ragged), reference.paged_attention(batch.q, batch.k, batch.v, batch.ragged)) < 2e-6
    )


@BOTH
def test_rows_over_two_devices(implementation: dispatch.Implementation) -> None:
    """As in data parallelism: a row gives the same token on any device."""
    logits = jnp.asarray(np.random.default_rng(2).standard_normal((4, 200)), jnp.float32)
    four: list[Any] = [np.ones(4, F32), np.full(4, 20, np.int32), np.full(4, 0.9, F32), np.zeros(4, F32)]
    p = RowParams(*(jnp.asarray(x) for x in [*four, np.arange(4, dtype=np.uint32), np.arange(4, dtype=np.int32)]))
    mesh = jax.make_mesh((2,), ("data",), devices=jax.devices()[:2])

    def draw(logits: jax.Array, p: RowParams) -> jax.Array:
        with dispatch.use(implementation):
            return sample(logits, p).tokens

    rows = P("data")
    cut = jax.shard_map(draw, mesh=mesh, in_specs=(rows, rows), out_specs=rows, check_vma=False)
    expected = np.asarray(jax.jit(draw)(logits, p))
    on_mesh = jax.device_put((logits, p), jax.NamedSharding(mesh, rows))
    np.testing.assert_array_equal(np.asarray(jax.jit(cut)(*on_mesh)), expected)
