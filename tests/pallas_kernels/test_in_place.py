# SPDX-License-Identifier: Apache-2.0
"""A step on a CPU writes into its pools and reads them without a copy of any, which would take longer than the step."""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.kv_write import kv_write
from pallas_kernels.paged_attention import paged_attention
from pallas_kernels.ragged import Ragged

BLOCKS, SLOTS, KV_HEADS, DIM = 4000, 16, 2, 32


def step(q: jax.Array, pools: list[jax.Array], slots: jax.Array, ragged: Ragged) -> tuple[jax.Array, list[jax.Array]]:
    """Two layers, each with its pools, as in a model."""
    out: list[jax.Array] = []
    for k_pool, v_pool in zip(pools[::2], pools[1::2], strict=True):
        new = q[:, :KV_HEADS]
        written = kv_write(k_pool, v_pool, new, new, slots)
        q = paged_attention(q, written.k_pool, written.v_pool, ragged)
        out += [written.k_pool, written.v_pool]
    return q, out


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("rows", "tokens"), [(1, 1), (4, 4), (2, 30)])
def test_pools_are_not_copied(rows: int, tokens: int, dtype: str) -> None:
    def of(*shape: int, kind: str = "int32") -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, kind)

    ragged = Ragged(
        block_tables=of(rows, 64),  # pyright: ignore[reportArgumentType]
        kv_lens=of(rows),  # pyright: ignore[reportArgumentType]
        cu_q_lens=of(rows + 1),  # pyright: ignore[reportArgumentType]
        distribution=of(2),  # pyright: ignore[reportArgumentType]
        decode_only=rows == tokens,
    )
    pools = [of(BLOCKS, SLOTS, KV_HEADS, DIM, kind=dtype)] * 4
    q = of(tokens, 4, DIM, kind=dtype)
    program = jax.jit(step, donate_argnums=1).lower(q, pools, of(tokens), ragged).compile()
    pool = BLOCKS * SLOTS * KV_HEADS * DIM * jnp.dtype(dtype).itemsize
    needed = program.memory_analysis()
    assert needed is not None and needed.temp_size_in_bytes < pool / 4
