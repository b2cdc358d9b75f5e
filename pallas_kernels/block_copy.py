# SPDX-License-Identifier: Apache-2.0
"""Copy whole KV blocks: within a pool (copy-on-write), from a pool into a staging array, and back.

A pool is an array of any dtype whose first axis counts blocks: keys, values, latents or per-slot scales.

    copy_blocks(pool, sources, destinations)   pool[destinations[i]] = pool[sources[i]], in place
    gather_blocks(pool, blocks)                staged[i] = pool[blocks[i]], zeros if the id is negative
    scatter_blocks(pool, staged, blocks)       pool[blocks[i]] = staged[i], in place

Ids are int32 [n]; negative ids are padding and copy nothing. Blocks are copied in no particular order, so within one
call no block may be written twice, nor be both source and destination. Donate a pool that changes in your jit, or XLA
copies it first.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels import checks, dispatch
from pallas_kernels.on_cpu import block_copy as on_cpu

_CHUNK = 4096  # elements per program


def copy_blocks(pool: jax.Array, sources: jax.Array, destinations: jax.Array) -> jax.Array:
    """Copy blocks within a pool."""
    pool, sources, destinations = (jnp.asarray(array) for array in (pool, sources, destinations))
    _check(pool, sources=sources, destinations=destinations)
    checks.check_shape("destinations", destinations, tuple(sources.shape), "as many as sources")
    if checks.is_concrete(sources, destinations):
        moved = (np.asarray(sources) >= 0) & (np.asarray(destinations) >= 0)
        read, written = np.asarray(sources)[moved], np.asarray(destinations)[moved]
        both = np.intersect1d(read, written)
        checks.require(both.size == 0, f"block {both[:1]} is both source and destination of one call")
        _check_once(written)
    if dispatch.implementation() == "cpu":
        return on_cpu.copy_blocks(pool, sources, destinations)
    return _move(pool, None, sources, destinations)


def gather_blocks(pool: jax.Array, blocks: jax.Array) -> jax.Array:
    """Copy blocks out of a pool into a new array [n, ...]."""
    pool, blocks = jnp.asarray(pool), jnp.asarray(blocks)
    _check(pool, blocks=blocks)
    checks.check_offsets("the staging array", (blocks.shape[0], *pool.shape[1:]), pool.dtype)
    if dispatch.implementation() == "cpu":
        return on_cpu.gather_blocks(pool, blocks)
    return _move(None, pool, blocks, None)


def scatter_blocks(pool: jax.Array, staged: jax.Array, blocks: jax.Array) -> jax.Array:
    """Copy staged blocks [n, ...] into a pool."""
    pool, staged, blocks = (jnp.asarray(array) for array in (pool, staged, blocks))
    _check(pool, blocks=blocks)
    checks.check_offsets("staged", staged.shape, staged.dtype)
    checks.check_shape("staged", staged, (blocks.shape[0], *pool.shape[1:]), "one block of the pool's shape per id")
    checks.require(staged.dtype == pool.dtype, f"staged is {staged.dtype} and the pool {pool.dtype}: expected the same")
    if checks.is_concrete(blocks):
        _check_once(np.asarray(blocks)[np.asarray(blocks) >= 0])
    if dispatch.implementation() == "cpu":
        return on_cpu.scatter_blocks(pool, staged, blocks)
    return _move(pool, staged, None, blocks)


def _check(pool: jax.Array, **ids: jax.Array) -> None:
    checks.require(
        pool.ndim >= 2 and pool.size > 0,
        f"a pool has at least 2 axes [blocks, ...] and 1 element, got shape {tuple(pool.shape)}",
    )
    checks.check_offsets("pool", pool.shape, pool.dtype)
    for name, array in ids.items():
        checks.check_rank(name, array, "n")
        checks.check_int32(name, array)
        checks.require(array.shape[0] > 0, f"{name} has {array.shape[0]} ids, expected at least 1")
        if checks.is_concrete(array):
            largest = int(np.asarray(array).max())
            checks.require(
                largest < pool.shape[0], f"{name} holds block {largest}, the pool has {pool.shape[0]} blocks"
            )


def _check_once(written: np.ndarray) -> None:
    ids, counts = np.unique(written, return_counts=True)
    checks.require(
        ids.size == written.size, f"block {ids[counts > 1][:1]} is written {counts[counts > 1][:1]} times in one call"
    )


# --- kernel -----------------------------------------------------------------------------------------------------


def _kernel(refs: dict[str, Any], out_ref: Any) -> None:
    i = pl.program_id(0)
    source_ref = refs.get("from", out_ref)  # within one pool, source and destination are the same array
    source = refs["sources"][i] if "sources" in refs else i
    target = refs["targets"][i] if "targets" in refs else i
    element = pl.program_id(1) * _CHUNK + jnp.arange(_CHUNK, dtype=jnp.int32)
    inside = element < out_ref.shape[1]
    readable = (source >= 0) & (source < source_ref.shape[0])

    def copy() -> None:
        block = plt.load(
            source_ref.at[jnp.where(readable, source, 0), element],
            mask=inside & readable,
            other=jnp.zeros((), out_ref.dtype),
        )
        plt.store(out_ref.at[target, element], block, mask=inside)

    if "targets" in refs:
        pl.when(readable & (target >= 0) & (target < out_ref.shape[0]))(copy)
    else:
        copy()  # a staged block without a source becomes zeros


def _move(
    pool: jax.Array | None,
    source: jax.Array | None,
    sources: jax.Array | None,
    targets: jax.Array | None,
) -> jax.Array:
    """Copy blocks of `source` (None: of the pool itself) into the pool (None: into a new array)."""
    like = pool if pool is not None else source
    ids = sources if sources is not None else targets
    assert like is not None and ids is not None
    size = math.prod(like.shape[1:])
    arrays = {"pool": pool, "from": source}
    inputs = {name: array.reshape(-1, size) for name, array in arrays.items() if array is not None}
    inputs |= {name: array for name, array in {"sources": sources, "targets": targets}.items() if array is not None}
    count = ids.shape[0]
    [moved] = dispatch.kernel_call(
        _kernel,
        grid=(count, -(-size // _CHUNK)),
        inputs=inputs,
        outputs=[jax.ShapeDtypeStruct((count if pool is None else pool.shape[0], size), like.dtype)],
        aliases={} if pool is None else {"pool": 0},
        num_warps=8,
        num_stages=1,
        name="copy_blocks",
    )
    return moved.reshape(-1, *like.shape[1:])
