# SPDX-License-Identifier: Apache-2.0
"""Shapes instead of arrays, for tests that lower or compile kernels without running them."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.paged_attention import paged_attention
from pallas_kernels.ragged import Ragged

S: Any = jax.ShapeDtypeStruct  # stands in for arrays
I32, F32, BF16 = jnp.int32, jnp.float32, jnp.bfloat16


def batch(rows: int, *, decode_only: bool = False) -> Ragged:
    return Ragged(
        block_tables=S((rows, 512), I32),
        kv_lens=S((rows,), I32),
        cu_q_lens=S((rows + 1,), I32),
        distribution=S((2,), I32),
        decode_only=decode_only,
    )


def paged_call(
    tokens: int, rows: int, heads: int, kv_heads: int, dim: int, **options: Any
) -> tuple[Callable[..., jax.Array], tuple[Any, ...]]:
    """Paged attention as a function of arrays, and the shapes to call it with: q, both pools, the batch, the rest."""
    dtype, kv, block_size = options.pop("dtype", BF16), options.pop("kv", None), options.pop("block_size", 16)
    pool = S((4096, block_size, kv_heads, dim), kv or dtype)
    arrays = {name: options.pop(name) for name in ("sinks", "k_scale", "v_scale") if name in options}
    ragged = batch(rows, decode_only=options.pop("decode_only", False))

    def call(q: Any, k: Any, v: Any, ragged: Ragged, arrays: Any) -> jax.Array:
        return paged_attention(q, k, v, ragged, **arrays, **options)

    return call, (S((tokens, heads, dim), dtype), pool, pool, ragged, arrays)
