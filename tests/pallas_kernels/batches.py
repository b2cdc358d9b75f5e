# SPDX-License-Identifier: Apache-2.0
"""Random ragged batches, and the small helpers of the tests that run ops on them."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from pallas_kernels import dispatch
from pallas_kernels.ragged import Ragged


@dataclass(frozen=True)
class Batch:
    """Queries, pools and the description of a batch. Slots that no row uses and padding tokens hold NaN."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    ragged: Ragged

    @property
    def used_tokens(self) -> int:
        return int(self.ragged.cu_q_lens[self.ragged.distribution[1]])

    @property
    def decode_only(self) -> Ragged:
        """The description with the promise that all rows are decode rows."""
        return replace(self.ragged, decode_only=True)


def make_batch(
    rng: np.random.Generator,
    *,
    q_lens: list[int],
    kv_lens: list[int],
    decode_rows: int = 0,
    kv_heads: int = 2,
    group: int = 2,
    dim: int = 64,
    v_dim: int | None = None,
    block_size: int = 16,
    padding_rows: int = 1,
    padding_tokens: int = 3,
    blocks: int | None = None,
    width: int | None = None,
) -> Batch:
    """Rows of the given lengths, with blocks scattered over the pool in random order. By default pool and tables are
    just large enough."""
    rows = len(q_lens) + padding_rows
    needed = [-(-n // block_size) for n in kv_lens]
    blocks = blocks or sum(needed) + 3  # block 0 is the null block, and two more are unused
    width = width or max([*needed, 1]) + 1
    ids = iter(rng.permutation(np.arange(1, blocks)))
    tables = np.full((rows, width), -(10**6), np.int32)  # unused entries must not be followed
    k = np.full((blocks, block_size, kv_heads, dim), np.nan)
    v = np.full((blocks, block_size, kv_heads, v_dim or dim), np.nan)
    for row, length in enumerate(kv_lens):
        for column in range(needed[row]):
            block = tables[row, column] = next(ids)
            filled = min(block_size, length - column * block_size)
            k[block, :filled] = rng.standard_normal((filled, *k.shape[2:]))
            v[block, :filled] = rng.standard_normal((filled, *v.shape[2:]))
    cu = np.zeros(rows + 1, np.int32)
    cu[1 : len(q_lens) + 1] = np.cumsum(q_lens)
    cu[len(q_lens) + 1 :] = 10**6  # must not be read either
    lens = np.full(rows, 10**6, np.int32)
    lens[: len(kv_lens)] = kv_lens
    tokens = int(sum(q_lens))
    q = np.full((tokens + padding_tokens, kv_heads * group, dim), np.nan)
    q[:tokens] = rng.standard_normal((tokens, kv_heads * group, dim))
    distribution = np.asarray([decode_rows, len(q_lens)], np.int32)
    return Batch(q, k, v, Ragged(block_tables=tables, kv_lens=lens, cu_q_lens=cu, distribution=distribution))


def call_jitted(implementation: dispatch.Implementation, function: Callable[..., Any], *arguments: Any) -> Any:
    """function(*arguments) as one compiled program of the given implementation."""
    with dispatch.use(implementation):
        return jax.jit(function)(*arguments)


def rounded(x: np.ndarray, dtype: Any) -> np.ndarray:
    """x as the given dtype holds it, in float64."""
    return stored(x, dtype).astype(np.float64)


def stored(x: np.ndarray, dtype: Any) -> np.ndarray:
    """x as an array of that dtype, converted by numpy because jax would compile a program per shape."""
    return np.asarray(x, np.float32).astype(dtype)


def error(got: Any, expected: np.ndarray) -> float:
    """||got - expected|| / ||expected||; a comparison with NaN always fails."""
    got = np.asarray(got).astype(np.float64)
    return float(np.linalg.norm(got - expected) / max(np.linalg.norm(expected), 1e-30))
