# SPDX-License-Identifier: Apache-2.0
"""Random inputs for the attention checks, as numpy arrays, with traps wherever a kernel must not read.

Unused slots, padding tokens and the block that unused table entries refer to hold NaN.
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from pallas_kernels.ragged import Ragged
from pallas_kernels.reference import Array


class PagedBatch(NamedTuple):
    """A batch laid out in a KV pool."""

    ragged: Ragged
    tokens: int  # query tokens, padding included
    blocks: int
    owned: Array  # bool [blocks, block_size]


@dataclass(frozen=True)
class Lengths:
    """The rows of a batch."""

    decode: tuple[int, ...] = ()  # KV length of each decode row
    chunks: tuple[tuple[int, int], ...] = ()  # (query tokens, KV length) of each prompt chunk
    padding_rows: int = 1
    padding_tokens: int = 3  # in a decode-only batch each padding row has its one token instead

    @property
    def decode_only(self) -> bool:
        return not self.chunks


@dataclass(frozen=True)
class PagedCase:
    name: str
    lengths: Lengths
    heads: int = 32
    kv_heads: int = 8
    dim: int = 128
    v_dim: int | None = None
    block_size: int = 16
    dtype: str = "bfloat16"
    kv: str | None = None  # dtype of the pool; None: the query's
    scales: str | None = None  # of a one-byte pool: "head" or "slot"
    window: int | None = None
    soft_cap: float | None = None
    sinks: bool = False
    options: dict[str, Any] = field(default_factory=dict)  # tiles


@dataclass(frozen=True)
class MlaCase:
    name: str
    lengths: Lengths
    heads: int = 128
    latent: int = 512
    rope: int = 64
    block_size: int = 16
    dtype: str = "bfloat16"
    kv: str | None = None
    scaled: bool = False


# What toy cases override.
TINY_PAGED: dict[str, Any] = dict(heads=4, kv_heads=2, dim=16, block_size=8)
TINY_MLA: dict[str, Any] = dict(heads=4, latent=32, rope=16, block_size=8)


def lay_out(rng: np.random.Generator, shape: Lengths, *, block_size: int, window: int | None = None) -> PagedBatch:
    """Assigns blocks to every row in random order and sets the traps."""
    lengths = [(1, kv_len) for kv_len in shape.decode] + list(shape.chunks)
    used = [-(-kv_len // block_size) for _, kv_len in lengths]
    blocks = sum(used) + 2
    ids = rng.permutation(blocks).astype(np.int32)
    trap = ids[-1]
    rows_padded = len(lengths) + shape.padding_rows
    tables = np.full((rows_padded, max([*used, 1]) + 1), trap, np.int32)
    # Garbage for the padding rows, small enough that reading it gives a wrong result instead of a crash.
    kv_lens = np.full((rows_padded,), 9, np.int32)
    cu = np.full((rows_padded + 1,), 1, np.int32)
    owned = np.zeros((blocks, block_size), bool)
    start, next_id = 0, 0
    for r, (count, kv_len) in enumerate(lengths):
        mine = ids[next_id : next_id + used[r]]
        owned[mine] = True
        if kv_len % block_size:
            owned[mine[-1], kv_len % block_size :] = False
        tables[r, : used[r]] = mine
        if window is not None:  # blocks before the window of every query token of the row
            tables[r, : max(kv_len - count - window + 1, 0) // block_size] = trap
        kv_lens[r], cu[r], cu[r + 1] = kv_len, start, start + count
        start, next_id = start + count, next_id + used[r]
    tokens = rows_padded if shape.decode_only else start + shape.padding_tokens
    ragged = Ragged(
        block_tables=tables,
        kv_lens=kv_lens,
        cu_q_lens=cu,
        distribution=np.array([len(shape.decode), len(lengths)], np.int32),
        decode_only=shape.decode_only,
    )
    return PagedBatch(ragged, tokens, blocks, owned)


def normal(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> Array:
    return rng.standard_normal(shape, np.float32).astype(jnp.dtype(dtype))


def queries(rng: np.random.Generator, batch: PagedBatch, shape: tuple[int, ...], dtype: str) -> Array:
    q = normal(rng, (batch.tokens, *shape), dtype)
    q[int(batch.ragged.cu_q_lens[batch.ragged.distribution[1]]) :] = np.nan
    return q


def pool_of(rng: np.random.Generator, batch: PagedBatch, shape: tuple[int, ...], dtype: str) -> Array:
    """A pool [blocks, block_size, *shape]: random where owned, NaN (for int8, the largest value) elsewhere."""
    full = (*batch.owned.shape, *shape)
    if dtype == "int8":
        pool = rng.integers(-127, 128, full, np.int8)
        pool[~batch.owned] = 127
        return pool
    pool = rng.standard_normal(full, np.float32)
    pool[~batch.owned] = np.nan
    return pool.astype(jnp.dtype(dtype))


def scales_of(rng: np.random.Generator, batch: PagedBatch, kv_heads: int, kind: str | None, dtype: str) -> Array | None:
    if kind is None:
        return None
    size = 1 / 64 if dtype == "int8" else 1.0  # gives either dtype a standard deviation of about one
    if kind == "head":
        return rng.uniform(0.5 * size, size, (kv_heads,)).astype(np.float32)
    per_slot = rng.uniform(0.5 * size, size, (*batch.owned.shape, kv_heads)).astype(np.float32)
    per_slot[~batch.owned] = np.nan
    return per_slot


class AttentionInputs(NamedTuple):
    """The arguments of one call, by name."""

    arrays: dict[str, Any]  # q, pools, the Ragged
    options: dict[str, Any]  # static, for the op and its oracle
    tiles: dict[str, Any]  # for the op only


def paged(rng: np.random.Generator, case: PagedCase) -> AttentionInputs:
    batch = lay_out(rng, case.lengths, block_size=case.block_size, window=case.window)
    kv, v_dim = case.kv or case.dtype, case.v_dim or case.dim
    arrays = dict(
        q=queries(rng, batch, (case.heads, case.dim), case.dtype),
        k_pool=pool_of(rng, batch, (case.kv_heads, case.dim), kv),
        v_pool=pool_of(rng, batch, (case.kv_heads, v_dim), kv),
        k_scale=scales_of(rng, batch, case.kv_heads, case.scales, kv),
        v_scale=scales_of(rng, batch, case.kv_heads, case.scales, kv),
        sinks=rng.standard_normal(case.heads, np.float32) if case.sinks else None,
        ragged=batch.ragged,
    )
    # A scale at which a few large scores dominate: a flat softmax would average a wrong score away.
    options = dict(
        scale=2 * case.dim**-0.5,
        window=case.window,
        soft_cap=case.soft_cap,
    )
    given = {name: array for name, array in arrays.items() if array is not None}
    return AttentionInputs(given, options, case.options)


def mla(rng: np.random.Generator, case: MlaCase) -> AttentionInputs:
    batch = lay_out(rng, case.lengths, block_size=case.block_size)
    width, kv = case.latent + case.rope, case.kv or case.dtype
    arrays: dict[str, Any] = dict(
        q=queries(rng, batch, (case.heads, width), case.dtype),
        pool=pool_of(rng, batch, (width,), kv),
        ragged=batch.ragged,
    )
    if case.scaled:
        arrays["pool_scale"] = np.array([1 / 64 if kv == "int8" else 0.7], np.float32)
    return AttentionInputs(arrays, dict(latent_dim=case.latent, scale=2 * width**-0.5), {})
