# SPDX-License-Identifier: Apache-2.0
"""The ops once more, in float64 numpy and as plainly as they can be written. Shares no code with the kernels."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from benchmarks.gpu.inputs import Batch, PagedInputs, RowOf

type Array = np.ndarray


def wide(x: Array) -> Array:
    return np.asarray(x).astype(np.float32).astype(np.float64)


def dense(
    q: Array,
    keys: Array,
    values: Array,
    positions: Array,
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: Array | None = None,
) -> Array:
    """Attention of queries [n, heads, dim] at these positions over keys [kv_heads, len, dim], values alike."""
    n, heads, _ = q.shape
    kv_heads, length, _ = keys.shape
    group = heads // kv_heads
    at = np.arange(length)
    visible = at[None, :] <= positions[:, None]
    if window is not None:
        visible &= at[None, :] > positions[:, None] - window
    out = np.zeros((n, heads, values.shape[2]))
    for h in range(heads):
        scores = scale * (q[:, h] @ keys[h // group].T)
        if soft_cap is not None:
            scores = soft_cap * np.tanh(scores / soft_cap)
        scores = np.where(visible, scores, -np.inf)
        top = scores.max(axis=1, initial=-np.inf if sinks is None else sinks[h], keepdims=True)
        weights = np.exp(scores - top)
        total = weights.sum(axis=1, keepdims=True) + (0 if sinks is None else np.exp(sinks[h] - top))
        out[:, h] = (weights / total) @ values[h // group]
    return out


def _gather(pool: Array, scale: Array | None, row: RowOf, block_size: int) -> Array:
    """The row's tokens of a pool [blocks, block_size, heads, dim] -> float64 [heads, kv_len, dim]."""
    blocks = row.blocks[: -(-row.kv_len // block_size)]
    x = wide(pool[blocks])
    if scale is not None:
        x = x * (wide(scale[blocks])[..., None] if scale.ndim == 3 else wide(scale)[None, None, :, None])
    return x.reshape(-1, *x.shape[2:])[: row.kv_len].transpose(1, 0, 2)


def _each_row(batch: Batch, shape: tuple[int, ...]) -> tuple[Array, Iterable[tuple[RowOf, slice, Array]]]:
    """An output of zeros, and each row that has KV with its query tokens and their positions."""
    live = (
        (row, slice(row.start, row.start + row.count), np.arange(row.kv_len - row.count, row.kv_len))
        for row in batch.rows
        if row.kv_len
    )
    return np.zeros(shape), live


def paged(inputs: PagedInputs) -> Array:
    arrays, options, batch = inputs
    k_pool, v_pool, q = arrays["k_pool"], arrays["v_pool"], arrays["q"]
    out, rows = _each_row(batch, (*q.shape[:2], v_pool.shape[3]))
    for row, tokens, positions in rows:
        out[tokens] = dense(
            wide(q[tokens]),
            _gather(k_pool, arrays.get("k_scale"), row, k_pool.shape[1]),
            _gather(v_pool, arrays.get("v_scale"), row, v_pool.shape[1]),
            positions,
            scale=options["scale"],
            window=options["window"],
            soft_cap=options["soft_cap"],
            sinks=wide(arrays["sinks"]) if "sinks" in arrays else None,
        )
    return out


def mla(inputs: PagedInputs) -> Array:
    arrays, options, batch = inputs
    pool, q, latent = arrays["pool"][:, :, None, :], arrays["q"], options["latent_dim"]
    out, rows = _each_row(batch, (*q.shape[:2], latent))
    for row, tokens, positions in rows:
        keys = _gather(pool, arrays.get("pool_scale"), row, pool.shape[1])
        out[tokens] = dense(wide(q[tokens]), keys, keys[..., :latent], positions, scale=options["scale"])
    return out


def grouped(lhs: Array, matrices: dict[int, Array], offsets: Array, width: int) -> Array:
    """Each group's matrix [width, k] times its rows of lhs; zeros for rows of no group."""
    out = np.zeros((len(lhs), width))
    for g, matrix in matrices.items():
        own = slice(offsets[g], offsets[g + 1])
        out[own] = wide(lhs[own]) @ wide(matrix).T
    return out


def grouped_gradients(
    lhs: Array, matrices: dict[int, Array], offsets: Array, d_out: Array, groups: int
) -> tuple[Array, Array]:
    """Of lhs, and of all matrices with their rows one after the other."""
    d_lhs, d_rhs = np.zeros(lhs.shape), np.zeros((groups, d_out.shape[1], lhs.shape[1]))
    for g, matrix in matrices.items():
        own = slice(offsets[g], offsets[g + 1])
        d_lhs[own] = wide(d_out[own]) @ wide(matrix)
        d_rhs[g] = wide(d_out[own]).T @ wide(lhs[own])
    return d_lhs, d_rhs.reshape(-1, lhs.shape[1])


# --- sampling ---------------------------------------------------------------------------------------------------


def _mix(h: Array, key: Array | None = None) -> Array:
    h = h ^ (h >> np.uint32(16))
    h = h * np.uint32(0x7FEB352D)
    h = h ^ (h >> np.uint32(15))
    h = h if key is None else h ^ key
    h = h * np.uint32(0x846CA68B)
    return h ^ (h >> np.uint32(16))


def gumbel(seed: int, position: int, size: int) -> Array:
    """The documented noise of (seed, position, id) for every id."""
    seeds, at = np.array([seed], np.uint32), np.array([position], np.uint32)
    first = _mix(_mix(seeds ^ np.uint32(0x9E3779B9)) + at * np.uint32(0x9E3779B1))
    second = _mix(_mix(seeds + np.uint32(0x85EBCA6B)) ^ _mix(at + np.uint32(0xC2B2AE35)))
    bits = _mix(np.arange(size, dtype=np.uint32) * np.uint32(0x9E3779B1) + first, second)
    uniform = bits.astype(np.float32) * np.float32(2.0**-32) + np.float32(2.0**-33)
    return -np.log(-np.log1p(-np.minimum(uniform.astype(np.float64), 1 - 2.0**-24)))


class Verdict(NamedTuple):
    token: int  # the exact answer
    exact: bool  # the token asked about is the exact answer
    accepted: bool  # or rounding can make it one
    survivors: Array  # bool, what the filters leave


def survivors_of(
    x: Array, *, temperature: float, top_k: int, top_p: float, min_p: float, mass_slack: float = 0.0
) -> Array:
    """min-p, then top-k with all ties, then top-p with higher ids first among equals. Slack loosens the borders."""
    keep = x > -np.inf
    if min_p > 0:
        keep &= x >= x.max() + temperature * np.log(min_p) - mass_slack
    if 0 < top_k < x.size:
        keep &= x >= np.partition(x, -top_k)[-top_k]
    if top_p < 1:
        ids = np.flatnonzero(keep)
        order = ids[np.lexsort((-ids, -x[ids]))]
        weights = np.exp((x[order] - x.max()) / temperature)
        before = np.cumsum(weights) - weights
        kept = before < (top_p + mass_slack) * weights.sum()
        kept[0] = True
        keep[order[~kept]] = False
    return keep


def judge(x: Array, token: int, *, seed: int, position: int, **filters: Any) -> Verdict:
    """Is `token` the draw of this row of logits, or as good as: within 1e-4 of the best score, 2e-5 of a border."""
    temperature = filters["temperature"]
    exact_survivors = survivors_of(x, **filters) if temperature > 0 else x > -np.inf
    if temperature == 0:
        best = int(np.argmax(x))
        return Verdict(best, token == best, token == best, exact_survivors)
    scores = (x - x.max()) / temperature + gumbel(seed, position, x.size)
    best = int(np.argmax(np.where(exact_survivors, scores, -np.inf)))
    if token == best:
        return Verdict(best, True, True, exact_survivors)
    loose, tight = (survivors_of(x, **filters, mass_slack=slack) for slack in (2e-5, -2e-5))
    accepted = bool(loose[token]) and scores[token] >= scores[tight].max(initial=-np.inf) - 1e-4
    return Verdict(best, False, accepted, exact_survivors)
