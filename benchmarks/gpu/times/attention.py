# SPDX-License-Identifier: Apache-2.0
"""Sections `time_decode`, `time_ragged` and `time_mla`: attention at serving shapes.

The floors: decode reads K and V of every used token once; a prompt's queries take two products with each visible key.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import models
from benchmarks.gpu.book import Page
from benchmarks.gpu.times import timing
from benchmarks.gpu.times.timing import Aim, Arrays, Timed
from benchmarks.models import Heads
from pallas_kernels.mla_attention import mla_attention
from pallas_kernels.paged_attention import paged_attention
from pallas_kernels.ragged import Ragged
from pallas_kernels.tuning import DecodeTiles, RaggedTiles, Tiles

BLOCK_SIZE = 16


def spec(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))


def one_byte(dtype: str) -> bool:
    return jnp.dtype(dtype).itemsize == 1


def tables(blocks: int, rows: int, width: int, sets: int) -> list[np.ndarray]:
    """Block tables that together cover the whole pool in random order."""
    order = np.random.default_rng(0).permutation(blocks).astype(np.int32)
    return [np.resize(np.roll(order, -i * rows * width), (rows, width)) for i in range(sets)]


def of_kind[T: Tiles](kind: type[T], tiles: Tiles | None) -> T | None:
    """The tiles if they are of this kind, else None: of an op with two kinds of tiles, one is varied."""
    return tiles if isinstance(tiles, kind) else None


def batch(table: np.ndarray, *, q_lens: list[int], kv_len: int, decode_only: bool = False) -> Ragged:
    """Rows with the same KV length."""
    rows = len(q_lens)
    return Ragged(
        block_tables=table,
        kv_lens=np.full(rows, kv_len, np.int32),
        cu_q_lens=np.concatenate([[0], np.cumsum(q_lens)]).astype(np.int32),
        distribution=np.array([rows if decode_only else 0, rows], np.int32),
        decode_only=decode_only,
    )


def _after(out: jax.Array, lengths: jax.Array) -> jax.Array:
    """The same lengths, made to depend on `out` so that the next call waits for it; costs a tiny kernel."""
    return lengths + (out[(0,) * out.ndim] > 1e30).astype(jnp.int32)


def _normal(seed: int, shape: tuple[int, ...], dtype: str) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, jnp.float32).astype(jnp.dtype(dtype))


def _decode_step(model: Heads, tiles: Tiles | None) -> timing.ChainStep:
    def step(q: jax.Array, fixed: Any, ragged: Ragged) -> jax.Array:
        k_pool, v_pool, scale = fixed
        return paged_attention(
            q,
            k_pool,
            v_pool,
            ragged,
            scale=1.0,
            window=model.window,
            soft_cap=model.soft_cap,
            k_scale=scale,
            v_scale=scale,
            decode_tiles=of_kind(DecodeTiles, tiles),
        )

    return step


def decode_case(
    model: Heads,
    rows: int,
    context: int,
    *,
    kv: str = "bfloat16",
    pool_tokens: int = 0,
    block_size: int = BLOCK_SIZE,
    tiles: Tiles | None = None,
) -> Timed:
    """A call's output is the next call's query, so the calls form a chain with nothing in between."""
    width = -(-context // block_size)
    used = 2 * rows * context * model.kv_heads * model.dim * jnp.dtype(kv).itemsize
    sets = timing.sets_needed(used)
    blocks = max(pool_tokens // block_size, rows * width * sets if pool_tokens == 0 else rows * width)
    pool = spec((blocks, block_size, model.kv_heads, model.dim), kv)

    def arrays(pools: tuple[jax.Array, ...]) -> Arrays:
        scale = jnp.full((model.kv_heads,), 1.0, jnp.float32) if one_byte(kv) else None
        batches = [
            batch(table, q_lens=[1] * rows, kv_len=context, decode_only=True)
            for table in tables(blocks, rows, width, sets)
        ]
        return Arrays(_normal(2, (rows, model.heads, model.dim), "bfloat16"), (*pools, scale), batches)

    return Timed(
        f"{model.name} {kv} {rows} x {context}" + ("" if block_size == BLOCK_SIZE else f" block {block_size}"),
        (pool, pool),
        arrays,
        _decode_step(model, tiles),
        bytes=used + 2 * 2 * rows * model.heads * model.dim,
        flops=4.0 * rows * context * model.heads * model.dim,
        target=None if one_byte(kv) else decode_target(rows, context),
        facts=dict(rows=rows, context=context, kv=kv, sets=sets, heads=model.heads, kv_heads=model.kv_heads),
    )


def decode_target(rows: int, context: int) -> Aim | None:
    if rows * context >= 256 * 1024:
        return Aim("copy_pct", 85)
    return {(64, 1024): Aim("copy_pct", 70), (8, 1024): Aim("copy_pct", 50)}.get((rows, context))


def decode_cases(tiny: bool) -> list[Timed]:
    if tiny:
        return [decode_case(models.TINY, 2, 24), decode_case(models.TINY, 2, 24, kv="float8_e4m3fn")]
    shapes = [(1, 1024), (1, 8192), (8, 1024), (8, 8192), (32, 4096), (64, 1024), (64, 4096)]
    shapes += [(64, 8192), (128, 1024), (128, 4096), (256, 1024), (256, 4096), (256, 8192)]
    whole = 256 * 8192
    cases = [decode_case(models.LLAMA_8B, *shape, pool_tokens=whole) for shape in shapes]
    fewer = [(1, 4096), (8, 1024), (64, 1024), (64, 4096), (256, 4096)]
    cases += [decode_case(models.LLAMA_8B, *s, kv="float8_e4m3fn", pool_tokens=whole // 2) for s in fewer]
    cases += [decode_case(models.LLAMA_8B, 64, 4096, kv="int8", pool_tokens=whole // 2)]
    for model in (models.QWEN3_0_6B, models.QWEN3_30B, models.QWEN3_235B, models.GEMMA_9B):
        cases += [decode_case(model, *s, pool_tokens=whole // 2) for s in ((8, 1024), (64, 1024), (64, 4096))]
    return cases + [decode_case(models.LLAMA_8B, 64, 4096, block_size=n, pool_tokens=whole // 2) for n in (32, 128)]


def visible_pairs(q_lens: list[int], prefix: int) -> float:
    """The (query, key) pairs under the causal mask, with `prefix` tokens of KV before the queries."""
    return float(sum(n * prefix + n * (n + 1) / 2 for n in q_lens))


def _ragged_arrays(
    q_shape: tuple[int, ...], sets: int, blocks: int, width: int, *, q_lens: list[int], kv_len: int, decode_only: bool
) -> Callable[[tuple[jax.Array, ...]], Arrays]:
    rows = len(q_lens)

    def arrays(pools: tuple[jax.Array, ...]) -> Arrays:
        batches = [
            batch(table, q_lens=q_lens, kv_len=kv_len, decode_only=decode_only)
            for table in tables(blocks, rows, width, sets)
        ]
        queries = [_normal(3 + i, q_shape, "bfloat16") for i in range(sets)]
        kv_lens = jnp.full(rows, kv_len, jnp.int32)
        return Arrays((kv_lens, None), pools, list(zip(queries, batches, strict=True)))

    return arrays


def ragged_case(
    model: Heads, tokens: int, *, rows: int = 1, prefix: int = 0, kv: str = "bfloat16", tiles: Tiles | None = None
) -> Timed:
    """`tokens` query tokens in `rows` sequences of equal length, each after `prefix` tokens of cached KV."""
    q_lens = [tokens // rows] * rows
    kv_len = q_lens[0] + prefix
    width = -(-kv_len // BLOCK_SIZE)
    used = 2 * rows * kv_len * model.kv_heads * model.dim * jnp.dtype(kv).itemsize
    q_bytes = 2 * tokens * model.heads * model.dim
    sets = min(timing.sets_needed(used + q_bytes), 4)
    blocks = rows * width * sets
    pool = spec((blocks, BLOCK_SIZE, model.kv_heads, model.dim), kv)

    def step(carry: Any, fixed: Any, one: Any) -> Any:
        (kv_lens, _), (k_pool, v_pool), (q, ragged) = carry, fixed, one
        scale = jnp.full((model.kv_heads,), 1.0, jnp.float32) if one_byte(kv) else None
        out = paged_attention(
            q,
            k_pool,
            v_pool,
            replace(ragged, kv_lens=kv_lens),
            window=model.window,
            soft_cap=model.soft_cap,
            k_scale=scale,
            v_scale=scale,
            ragged_tiles=of_kind(RaggedTiles, tiles),
        )
        return _after(out, kv_lens), out

    return Timed(
        f"{model.name} {kv} {rows} x {q_lens[0]}" + (f" after {prefix}" if prefix else ""),
        (pool, pool),
        _ragged_arrays(
            (tokens, model.heads, model.dim), sets, blocks, width, q_lens=q_lens, kv_len=kv_len, decode_only=False
        ),
        step,
        bytes=used + 2 * q_bytes,
        flops=4 * model.heads * model.dim * visible_pairs(q_lens, prefix),
        target=Aim("tflops", 300) if (tokens, rows, kv) == (8192, 1, "bfloat16") else None,
        facts=dict(rows=rows, tokens=tokens, prefix=prefix, kv=kv, sets=sets, heads=model.heads),
    )


def ragged_cases(tiny: bool) -> list[Timed]:
    if tiny:
        return [ragged_case(models.TINY, 16, rows=2, prefix=9)]
    llama = models.LLAMA_8B
    cases = [ragged_case(llama, tokens) for tokens in (512, 1024, 2048, 4096, 8192)]
    cases += [ragged_case(llama, tokens, rows=8) for tokens in (512, 2048, 8192)]
    cases += [ragged_case(llama, tokens, prefix=4096) for tokens in (512, 2048, 8192)]
    cases += [ragged_case(llama, 2048, rows=8, prefix=4096), ragged_case(llama, 8192, kv="float8_e4m3fn")]
    others = (models.QWEN3_0_6B, models.QWEN3_235B, models.GEMMA_9B)
    return cases + [ragged_case(model, tokens) for model in others for tokens in (2048, 8192)]


def mla_case(rows: int, context: int, *, tokens: int = 0, kv: str = "bfloat16", tiles: Tiles | None = None) -> Timed:
    """DeepSeek's heads: decode rows, or one prompt of `tokens` tokens at the end of `context`."""
    heads, latent, rope = models.DEEPSEEK_HEADS, models.DEEPSEEK_LATENT, models.DEEPSEEK_ROPE
    q_lens, decode_only = ([tokens], False) if tokens else ([1] * rows, True)
    width = -(-context // BLOCK_SIZE)
    used = rows * context * (latent + rope) * jnp.dtype(kv).itemsize
    q_shape = (sum(q_lens), heads, latent + rope)
    sets = min(timing.sets_needed(used + 2 * math.prod(q_shape)), 8)
    blocks = rows * width * sets

    def step(carry: Any, fixed: Any, one: Any) -> Any:
        (kv_lens, _), (pool,), (q, ragged) = carry, fixed, one
        out = mla_attention(
            q,
            pool,
            replace(ragged, kv_lens=kv_lens),
            latent_dim=latent,
            scale=192**-0.5,
            pool_scale=jnp.full((1,), 1.0, jnp.float32) if one_byte(kv) else None,
            decode_tiles=of_kind(DecodeTiles, tiles),
            ragged_tiles=of_kind(RaggedTiles, tiles),
        )
        return _after(out, kv_lens), out

    pairs = visible_pairs(q_lens, context - tokens) if tokens else float(rows * context)
    return Timed(
        f"deepseek {kv} " + (f"prompt {tokens} of {context}" if tokens else f"{rows} x {context}"),
        (spec((blocks, BLOCK_SIZE, latent + rope), kv),),
        _ragged_arrays(q_shape, sets, blocks, width, q_lens=q_lens, kv_len=context, decode_only=decode_only),
        step,
        bytes=used + 2 * sum(q_lens) * heads * (2 * latent + rope),
        flops=2.0 * heads * (2 * latent + rope) * pairs,
        facts=dict(rows=rows, context=context, tokens=tokens, kv=kv, sets=sets),
    )


def mla_cases(tiny: bool) -> list[Timed]:
    if tiny:
        return [mla_case(1, 8)]
    shapes = [(1, 4096), (8, 1024), (8, 4096), (32, 4096), (64, 1024), (64, 4096), (128, 4096), (256, 1024)]
    cases = [mla_case(*shape) for shape in shapes]
    cases += [mla_case(64, 4096, kv="float8_e4m3fn")]
    return cases + [mla_case(1, tokens, tokens=tokens) for tokens in (512, 2048)]


def run_decode(page: Page) -> None:
    timing.run(page, decode_cases(page.settings.tiny))


def run_ragged(page: Page) -> None:
    timing.run(page, ragged_cases(page.settings.tiny))


def run_mla(page: Page) -> None:
    timing.run(page, mla_cases(page.settings.tiny))
