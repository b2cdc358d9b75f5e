# SPDX-License-Identifier: Apache-2.0
"""Sections `time_kv_write` and `time_blocks`: KV writes and block moves at serving shapes.

The floors: a KV write reads each new value and writes it; a block move reads and writes each block.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import models
from benchmarks.gpu.book import Page
from benchmarks.gpu.times import timing
from benchmarks.gpu.times.attention import BLOCK_SIZE, spec
from benchmarks.gpu.times.timing import Aim, Arrays, Timed
from benchmarks.models import Heads
from pallas_kernels.block_copy import copy_blocks, gather_blocks, scatter_blocks
from pallas_kernels.kv_write import kv_write

_POOL_BYTES = 2**30  # size of each pool


def _pool(block: tuple[int, ...], dtype: str, tiny: bool) -> jax.ShapeDtypeStruct:
    size = int(np.prod(block)) * jnp.dtype(dtype).itemsize
    return spec((64 if tiny else _POOL_BYTES // size, *block), dtype)


def write_case(model: Heads, tokens: int, *, kv: str = "bfloat16", scales: str | None = None) -> Timed:
    pool = _pool((BLOCK_SIZE, model.kv_heads, model.dim), kv, model is models.TINY)
    slots, sets = pool.shape[0] * BLOCK_SIZE, 4
    size = tokens * model.kv_heads * model.dim

    def arrays(pools: tuple[jax.Array, ...]) -> Arrays:
        still = jnp.ones((model.kv_heads,), jnp.float32) if scales == "head" else None
        per_slot = (*pool.shape[:2], model.kv_heads)
        moving = tuple(jnp.full(per_slot, 1.0 + i, jnp.float32) if scales == "slot" else None for i in range(2))
        order = np.random.default_rng(1).permutation(slots).astype(np.int32)
        several = []
        for i in range(sets):
            keys = jax.random.split(jax.random.key(i))
            new = [jax.random.normal(k, (tokens, model.kv_heads, model.dim), jnp.float32) for k in keys]
            several.append((*(x.astype(jnp.bfloat16) for x in new), np.resize(np.roll(order, -i * tokens), tokens)))
        return Arrays((pools, moving), still, several)

    def step(carry: Any, fixed: Any, one: Any) -> Any:
        ((k_pool, v_pool), (k_scale, v_scale)), (k, v, where) = carry, one
        given = (k_scale, v_scale) if scales == "slot" else (fixed, fixed)
        written = kv_write(k_pool, v_pool, k, v, where, k_scale=given[0], v_scale=given[1])
        kept = (written.k_scale, written.v_scale) if scales == "slot" else (None, None)
        return (written.k_pool, written.v_pool), kept

    return Timed(
        f"{model.name} {kv} {tokens} tokens" + (f" scale per {scales}" if scales else ""),
        (pool, pool),
        arrays,
        step,
        bytes=2.0 * size * (2 + jnp.dtype(kv).itemsize) + 4 * tokens,
        donate=True,
        target=Aim("us", 10, at_most=True) if (tokens, kv) == (256, "bfloat16") else None,
        facts=dict(tokens=tokens, kv=kv, scales=scales),
    )


def write_cases(tiny: bool) -> list[Timed]:
    if tiny:
        return [write_case(models.TINY, 4), write_case(models.TINY, 4, kv="float8_e4m3fn", scales="slot")]
    cases = [write_case(models.LLAMA_8B, tokens) for tokens in (1, 8, 64, 256, 1024, 8192)]
    cases += [write_case(models.LLAMA_8B, n, kv="float8_e4m3fn", scales="head") for n in (1, 64, 256, 8192)]
    cases += [write_case(models.LLAMA_8B, n, kv="float8_e4m3fn", scales="slot") for n in (256, 8192)]
    return [*cases, write_case(models.LLAMA_8B, 256, kv="int8", scales="slot"), write_case(models.GEMMA_9B, 256)]


def block_case(name: str, block: tuple[int, ...], count: int, *, dtype: str = "bfloat16", staged: bool) -> Timed:
    """Blocks copied within the pool, or `staged`: gathered into a buffer and scattered back, which moves them twice."""
    pool = _pool(block, dtype, name == models.TINY.name)
    size, sets = float(count * int(np.prod(block)) * jnp.dtype(dtype).itemsize), 4

    def arrays(pools: tuple[jax.Array, ...]) -> Arrays:
        order = np.random.default_rng(2).permutation(pool.shape[0]).astype(np.int32)
        ids = [np.resize(np.roll(order, -2 * i * count), 2 * count) for i in range(sets)]
        return Arrays(pools[0], None, [(one[:count], one[count:]) for one in ids])

    def step(pool: jax.Array, fixed: Any, one: Any) -> jax.Array:
        sources, targets = one
        if staged:
            return scatter_blocks(pool, gather_blocks(pool, sources), targets)
        return copy_blocks(pool, sources, targets)

    return Timed(
        f"{name} {dtype} {count} blocks " + ("gathered and scattered" if staged else "within the pool"),
        (pool,),
        arrays,
        step,
        bytes=size * (4 if staged else 2),
        donate=True,
        facts=dict(blocks=count, block_bytes=size / count, staged=staged),
    )


def block_cases(tiny: bool) -> list[Timed]:
    if tiny:
        return [block_case("tiny", (BLOCK_SIZE, 2, 16), 3, staged=staged) for staged in (False, True)]
    llama, latent = (BLOCK_SIZE, 8, 128), (BLOCK_SIZE, 576)
    cases = [block_case("llama-8b", llama, n, staged=s) for s in (False, True) for n in (1, 64, 1024, 4096)]
    cases += [block_case("llama-8b", llama, 1024, dtype="float8_e4m3fn", staged=False)]
    return [*cases, block_case("deepseek", latent, 1024, staged=False)]


def run_kv_write(page: Page) -> None:
    timing.run(page, write_cases(page.settings.tiny))


def run_blocks(page: Page) -> None:
    timing.run(page, block_cases(page.settings.tiny))
