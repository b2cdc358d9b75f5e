# SPDX-License-Identifier: Apache-2.0
"""Float64 truths that share no code with the kernels or their twins, and the random batches they are tried on."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import dispatch


@dataclass(frozen=True)
class Batch:
    """A ragged batch over a paged pool. Every slot that no row owns holds NaN, and so does every padding token."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    block_tables: np.ndarray
    kv_lens: np.ndarray
    cu_q_lens: np.ndarray
    distribution: np.ndarray

    @property
    def used_tokens(self) -> int:
        return int(self.cu_q_lens[self.distribution[1]])

    def described(self) -> dict[str, jax.Array]:
        names = ("block_tables", "kv_lens", "cu_q_lens", "distribution")
        return {name: jnp.asarray(getattr(self, name)) for name in names}


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
    """Rows of the given lengths, their blocks scattered over the pool in random order. Pool and tables are as large as
    given, or as needed."""
    rows = len(q_lens) + padding_rows
    needed = [-(-n // block_size) for n in kv_lens]
    blocks = blocks or sum(needed) + 3  # block 0 is the null block, two more belong to nobody
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
    cu[len(q_lens) + 1 :] = 10**6  # nor these
    lens = np.full(rows, 10**6, np.int32)
    lens[: len(kv_lens)] = kv_lens
    tokens = int(sum(q_lens))
    q = np.full((tokens + padding_tokens, kv_heads * group, dim), np.nan)
    q[:tokens] = rng.standard_normal((tokens, kv_heads * group, dim))
    distribution = np.asarray([decode_rows, len(q_lens)], np.int32)
    return Batch(q, k, v, tables, lens, cu, distribution)


def call_jitted(implementation: dispatch.Implementation, function: Callable[..., Any], *arguments: Any) -> Any:
    """function(*arguments) as one compiled program of the given implementation."""
    with dispatch.use(implementation):
        return jax.jit(function)(*arguments)


def rounded(x: np.ndarray, dtype: Any) -> np.ndarray:
    """x as the given dtype holds it, in float64."""
    return stored(x, dtype).astype(np.float64)


def stored(x: np.ndarray, dtype: Any) -> np.ndarray:
    """x as an array of that dtype. By numpy: jax would compile a program for each shape."""
    return np.asarray(x, np.float32).astype(dtype)


def dense_attention(
    batch: Batch,
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: np.ndarray | None = None,
) -> np.ndarray:
    """Attention of every used token by the book, in float64; zeros for padding."""
    tokens, heads, _ = batch.q.shape
    group = heads // batch.k.shape[2]
    out = np.zeros((tokens, heads, batch.v.shape[3]))
    for row in range(int(batch.distribution[1])):
        begin, end, length = int(batch.cu_q_lens[row]), int(batch.cu_q_lens[row + 1]), int(batch.kv_lens[row])
        if length == 0:
            continue
        blocks = batch.block_tables[row, : -(-length // batch.k.shape[1])]
        keys = batch.k[blocks].reshape(-1, *batch.k.shape[2:])[:length]
        values = batch.v[blocks].reshape(-1, *batch.v.shape[2:])[:length]
        for i in range(end - begin):
            position = length - (end - begin) + i
            first = 0 if window is None else max(0, position - window + 1)
            for head in range(heads):
                logits = keys[first : position + 1, head // group] @ batch.q[begin + i, head] * scale
                if soft_cap is not None:
                    logits = np.tanh(logits / soft_cap) * soft_cap
                extra = [] if sinks is None else [float(sinks[head])]
                top = max([logits.max(), *extra])
                weights = np.exp(logits - top)
                total = weights.sum() + sum(np.exp(e - top) for e in extra)
                out[begin + i, head] = weights @ values[first : position + 1, head // group] / total
    return out


def error(got: Any, expected: np.ndarray) -> float:
    """||got - expected|| / ||expected||; NaN never passes a comparison with it."""
    got = np.asarray(got).astype(np.float64)
    return float(np.linalg.norm(got - expected) / max(np.linalg.norm(expected), 1e-30))


def surviving(logits: np.ndarray, *, temperature: float, top_k: int, top_p: float, min_p: float) -> np.ndarray:
    """Which entries of one row the filters keep, by sorting, in float64: True, False per entry."""
    kept = logits > -np.inf
    if temperature == 0:
        return kept
    scaled = logits.astype(np.float64) / temperature
    if min_p > 0:
        kept &= ~(scaled < scaled.max() + np.log(min_p))
    if 0 < top_k < logits.size:
        survivors = np.sort(scaled[kept])[::-1]
        kept &= scaled >= survivors[min(top_k, survivors.size) - 1]
    if top_p < 1:
        ids = np.flatnonzero(kept)
        order = ids[np.argsort(scaled[ids], kind="stable")]  # ascending, equals by ascending id
        weights = np.exp(scaled[order] - scaled.max())
        cumulative = np.cumsum(weights / weights.sum())
        dropped = cumulative <= 1 - top_p
        dropped[-1] = False
        kept[order[dropped]] = False
    return kept
