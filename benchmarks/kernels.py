# SPDX-License-Identifier: Apache-2.0
"""Measures the CPU implementation of paged attention: `python -m benchmarks.kernels [--json FILE]`.

It is compared with dense attention over exactly the tokens that exist: contiguous keys and values, the same heads, no
paging, no padding. The dense side has two layouts: tokens first, as in the pools, in the faster of two formulations
(two einsums, or `jax.nn.dot_product_attention`); and heads first, the fastest layout for XLA's CPU matmuls, which a
pool that is written token by token cannot have. One process measures all of them in interleaved rounds and prints the
median of each ratio round by round, below 1 where paged attention is faster, and the interquartile range of the first.
Targets: at most 1.5 for decode and 2.0 for prefill.
"""

import argparse
import functools
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import arguments, facts, models
from pallas_kernels.paged_attention import paged_attention
from pallas_kernels.ragged import Ragged

BLOCK_SIZE = 16
WIDTH_TOKENS = 8192  # the block table's capacity: as in a server, larger than any row here needs
DECODE_AIM, PREFILL_AIM = 1.5, 2.0


HEADS = (models.LLAMA_8B, models.SMALL)


@dataclass(frozen=True)
class AttentionResult:
    case: str
    heads: str
    twin_ms: float  # of paged attention; recorded results have this name
    dense_ms: float  # tokens first
    ratio: float
    spread: float
    heads_first_ms: float
    heads_first_ratio: float
    aim: float


def dense_library(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """q [rows, new, heads, dim], k and v [rows, tokens, kv_heads, dim]; causal, the new tokens are the last."""
    return jax.nn.dot_product_attention(q, k, v, is_causal=q.shape[1] > 1)


def dense_einsum(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """The same with two einsums."""
    rows, new, heads, dim = q.shape
    kv_heads = k.shape[2]
    grouped = q.reshape(rows, new, kv_heads, heads // kv_heads, dim) * dim**-0.5
    weights = _softmax(jnp.einsum("bqhgd,bthd->bhgqt", grouped, k))
    return jnp.einsum("bhgqt,bthd->bqhgd", weights, v).reshape(q.shape)


def dense_heads_first(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """k and v [rows, kv_heads, tokens, dim]: plain batched matmuls."""
    rows, new, heads, dim = q.shape
    kv_heads = k.shape[1]
    flat = q.transpose(0, 2, 1, 3).reshape(rows, kv_heads, -1, dim) * dim**-0.5
    scores = jnp.einsum("bhrd,bhtd->bhrt", flat, k).reshape(rows, kv_heads, heads // kv_heads, new, -1)
    weights = _softmax(scores).reshape(rows, kv_heads, heads // kv_heads * new, -1)
    out = jnp.einsum("bhrt,bhtd->bhrd", weights, v)
    return out.reshape(rows, heads, new, dim).transpose(0, 2, 1, 3)


def _softmax(scores: jax.Array) -> jax.Array:
    """The softmax over the visible tokens; scores [rows, kv_heads, group, new, tokens]."""
    new, tokens = scores.shape[3:]
    if new > 1:
        visible = jnp.arange(tokens)[None, :] <= jnp.arange(new)[:, None]
        scores = jnp.where(visible[None, None, None], scores, -jnp.inf)
    return jax.nn.softmax(scores, axis=-1)


def interleaved(calls: Sequence[Callable[[], jax.Array]], seconds: float) -> list[list[float]]:
    """Milliseconds of every call, in interleaved rounds, so that temporary load affects all of them."""
    for call in calls:
        call().block_until_ready()
    rounds: list[list[float]] = []
    deadline = time.perf_counter() + seconds
    while len(rounds) < 5 or (time.perf_counter() < deadline and len(rounds) < 200):
        rounds.append([])
        for call in calls:
            start = time.perf_counter()
            call().block_until_ready()
            rounds[-1].append((time.perf_counter() - start) * 1e3)
    return rounds


def measure(
    *, heads: models.Heads, rows: int, tokens: int, prefill: bool, seconds: float, seed: int
) -> AttentionResult:
    """`rows` sequences of `tokens` tokens each; prefill computes all of them, decode the last one."""
    rng = np.random.default_rng(seed)
    per_row = -(-tokens // BLOCK_SIZE)
    blocks = rows * per_row + 1
    table = np.zeros((rows, WIDTH_TOKENS // BLOCK_SIZE), np.int32)
    table[:, :per_row] = rng.permutation(np.arange(1, blocks)).reshape(rows, per_row)
    shape = (blocks, BLOCK_SIZE, heads.kv_heads, heads.dim)
    k_pool, v_pool = (jnp.asarray(rng.standard_normal(shape, np.float32)) for _ in range(2))
    k, v = (p[table[:, :per_row]].reshape(rows, -1, *shape[2:])[:, :tokens] for p in (k_pool, v_pool))
    new = tokens if prefill else 1
    q = jnp.asarray(rng.standard_normal((rows * new, heads.heads, heads.dim), np.float32))
    ragged = Ragged(
        block_tables=jnp.asarray(table),
        kv_lens=jnp.full((rows,), tokens, jnp.int32),
        cu_q_lens=jnp.arange(rows + 1, dtype=jnp.int32) * new,
        distribution=jnp.asarray([0 if prefill else rows, rows], jnp.int32),
        decode_only=not prefill,
    )
    paged = jax.jit(paged_attention)
    k_heads, v_heads = (jnp.asarray(np.asarray(x).transpose(0, 2, 1, 3).copy()) for x in (k, v))
    sides = (
        (jax.jit(dense_einsum), k, v),
        (jax.jit(dense_library), k, v),
        (jax.jit(dense_heads_first), k_heads, v_heads),
    )
    q_dense = q.reshape(rows, new, heads.heads, heads.dim)
    got = np.asarray(paged(q, k_pool, v_pool, ragged))
    for dense, *kv in sides:
        np.testing.assert_allclose(got, np.asarray(dense(q_dense, *kv)).reshape(got.shape), atol=2e-5)
    calls = [lambda: paged(q, k_pool, v_pool, ragged), *(functools.partial(d, q_dense, *kv) for d, *kv in sides)]
    rounds = interleaved(calls, seconds)
    twin_ms, *dense_ms, heads_first_ms = (statistics.median(times) for times in zip(*rounds, strict=True))
    best = 1 + dense_ms.index(min(dense_ms))
    ratios = sorted(times[0] / times[best] for times in rounds)
    return AttentionResult(
        case=f"prefill {rows} x {tokens}" if prefill else f"decode  B={rows} context={tokens}",
        heads=heads.name,
        twin_ms=twin_ms,
        dense_ms=min(dense_ms),
        ratio=statistics.median(ratios),
        spread=ratios[len(ratios) * 3 // 4] - ratios[len(ratios) // 4],
        heads_first_ms=heads_first_ms,
        heads_first_ratio=statistics.median(times[0] / times[-1] for times in rounds),
        aim=PREFILL_AIM if prefill else DECODE_AIM,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kernels", description="Compare paged attention with dense attention on this CPU."
    )
    parser.add_argument("--json", type=arguments.file_to_write, metavar="FILE", help="also write the rows to FILE")
    parser.add_argument("--seconds", type=arguments.positive, default=2.0, help="time for each row")
    parser.add_argument("--seed", type=int, default=0, help="seed of the inputs (default: 0)")
    options = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    print(f"jax {jax.__version__}, float32, block size {BLOCK_SIZE}, tables of {WIDTH_TOKENS} tokens")
    print(
        f"{'case':28} {'heads':10} {'paged ms':>9} {'dense ms':>9} {'ratio':>7} {'spread':>7} "
        f"{'heads first':>12} {'target':>7}"
    )
    rows: list[AttentionResult] = []
    for heads in HEADS:
        shapes = [(b, n, False) for b in (1, 8, 32) for n in (128, 1024, 4096)] + [(1, 512, True), (8, 64, True)]
        for count, tokens, prefill in shapes:
            row = measure(
                heads=heads, rows=count, tokens=tokens, prefill=prefill, seconds=options.seconds, seed=options.seed
            )
            rows.append(row)
            print(
                f"{row.case:28} {row.heads:10} {row.twin_ms:9.2f} {row.dense_ms:9.2f} {row.ratio:7.2f} "
                f"{row.spread:7.2f} {row.heads_first_ratio:12.2f} {row.aim:7.1f}",
                flush=True,
            )
    if options.json:
        content = facts.collect() | {"processor": facts.processor(), "rows": [asdict(row) for row in rows]}
        options.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
