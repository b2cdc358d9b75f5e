# SPDX-License-Identifier: Apache-2.0
"""The ops in plain numpy, mostly float64, written to be read: what the tests and the GPU run book compare with.

A function has the name and the arguments of its op, and takes arrays by numpy or jax. It shares no code with the
kernels, nor with the code that CPUs run, so that a mistake in those cannot hide here.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np

from pallas_kernels.ragged import Ragged

type Array = np.ndarray


def wide(x: Any) -> Array:
    """x in float64, which holds every value of the smaller dtypes exactly."""
    return np.asarray(x).astype(np.float64)


# --- attention --------------------------------------------------------------------------------------------------


def paged_attention(
    q: Any,
    k_pool: Any,
    v_pool: Any,
    ragged: Ragged,
    *,
    scale: float | None = None,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: Any = None,
    k_scale: Any = None,
    v_scale: Any = None,
) -> Array:
    """[tokens, heads, v_dim]; zeros for tokens of no row, and for rows without KV."""
    q, k_pool, v_pool = (np.asarray(array) for array in (q, k_pool, v_pool))
    out = np.zeros((*q.shape[:2], v_pool.shape[3]))
    for queries, positions, table in _rows(ragged):
        # Nothing before the first query's window is read.
        start = 0 if window is None else max(0, int(positions[0]) - window + 1)
        stop = int(positions[-1]) + 1
        tokens = np.arange(start, stop)
        visible = tokens[None, :] <= positions[:, None]
        if window is not None:
            visible &= tokens[None, :] > positions[:, None] - window
        out[queries] = attention(
            wide(q[queries]),
            _cached(k_pool, k_scale, table, start, stop),
            _cached(v_pool, v_scale, table, start, stop),
            visible,
            scale=q.shape[2] ** -0.5 if scale is None else scale,
            soft_cap=soft_cap,
            sinks=sinks,
        )
    return out


def mla_attention(q: Any, pool: Any, ragged: Ragged, *, latent_dim: int, scale: float, pool_scale: Any = None) -> Array:
    """[tokens, heads, latent_dim]: paged attention with one KV head, whose values are the start of its keys."""
    keys = np.asarray(pool)[:, :, None, :]
    values = keys[..., :latent_dim]
    return paged_attention(q, keys, values, ragged, scale=scale, k_scale=pool_scale, v_scale=pool_scale)


def attention(
    q: Array,
    keys: Array,
    values: Array,
    visible: Array,
    *,
    scale: float,
    soft_cap: float | None = None,
    sinks: Any = None,
) -> Array:
    """q [n, heads, dim], keys and values [tokens, kv_heads, dim], visible [n, tokens] -> [n, heads, v_dim]."""
    heads, kv_heads = q.shape[1], keys.shape[1]
    out = np.zeros((*q.shape[:2], values.shape[2]))
    for head in range(heads):
        shared = head // (heads // kv_heads)
        scores = scale * (q[:, head] @ keys[:, shared].T)
        if soft_cap is not None:
            scores = soft_cap * np.tanh(scores / soft_cap)
        scores = np.where(visible, scores, -np.inf)
        value = values[:, shared]
        if sinks is not None:  # one more token, whose value is zero
            scores = np.column_stack([scores, np.full(len(scores), float(sinks[head]))])
            value = np.vstack([value, np.zeros(value.shape[1])])
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        out[:, head] = weights / weights.sum(axis=1, keepdims=True) @ value
    return out


def _rows(ragged: Ragged) -> Iterator[tuple[slice, Array, Array]]:
    """Each row that has queries and KV: its query tokens, their positions, its block table."""
    starts, lengths, tables = (np.asarray(x) for x in (ragged.cu_q_lens, ragged.kv_lens, ragged.block_tables))
    for row in range(int(ragged.distribution[1])):
        start, stop, length = int(starts[row]), int(starts[row + 1]), int(lengths[row])
        if stop > start and length > 0:
            yield slice(start, stop), np.arange(length - (stop - start), length), tables[row]


def _cached(pool: Array, scale: Any, table: Array, start: int, stop: int) -> Array:
    """The tokens [start, stop) of a row, [tokens, heads, dim], in float64."""
    block_size = pool.shape[1]
    blocks = table[start // block_size : -(-stop // block_size)]
    x = wide(pool[blocks])
    if scale is not None:
        scale = wide(scale)
        x = x * (scale[blocks] if scale.ndim == 3 else scale)[..., None]
    x = x.reshape(-1, *x.shape[2:])
    skipped = start % block_size
    return x[skipped : skipped + stop - start]


# --- KV ---------------------------------------------------------------------------------------------------------

LARGEST = {"int8": 127.0, "float8_e4m3fn": 448.0, "float8_e5m2": 57344.0}


def kv_write(pool: Any, new: Any, slots: Any, *, scale: Any = None) -> tuple[Array, Array | None]:
    """One pool [blocks, block_size, heads, dim] and its scale after the write, bit for bit."""
    out, new = np.array(pool), np.asarray(new)
    scale = None if scale is None else np.array(scale)
    blocks, block_size = out.shape[:2]
    for token, slot in zip(new, np.asarray(slots).tolist(), strict=True):
        if not 0 <= slot < blocks * block_size:
            continue
        place = slot // block_size, slot % block_size
        used = scale
        if scale is not None and scale.ndim == 3:
            used = scale[place] = slot_scale(token, out.dtype)
        out[place] = token if out.dtype == new.dtype else encode(token, used, out.dtype)
    return out, scale


def encode(x: Array, scale: Array | None, dtype: Any) -> Array:
    """x [..., heads, dim] / scale [..., heads] in a one-byte dtype: clipped, and for int8 rounded half up."""
    x = x.astype(np.float32)
    quotient = x if scale is None else x / scale[..., None]
    limit = np.float32(LARGEST[np.dtype(dtype).name])
    clipped = np.clip(quotient, -limit, limit)
    return np.floor(clipped + np.float32(0.5)).astype(dtype) if dtype == np.int8 else clipped.astype(dtype)


def slot_scale(x: Array, dtype: Any) -> Array:
    """float32 [..., heads]: maps the largest magnitude of each head to the dtype's; 1 for zeros and denormals."""
    scale = np.abs(x.astype(np.float32)).max(axis=-1) * np.float32(1 / LARGEST[np.dtype(dtype).name])
    return np.where(scale >= np.finfo(np.float32).tiny, scale, np.float32(1))


def copy_blocks(pool: Any, sources: Any, destinations: Any) -> Array:
    """The pool after pool[destinations[i]] = pool[sources[i]]."""
    return scatter_blocks(
        pool,
        [np.asarray(pool)[source] for source in sources],
        [destination if source >= 0 else -1 for source, destination in zip(sources, destinations, strict=True)],
    )


def gather_blocks(pool: Any, blocks: Any) -> Array:
    """pool[blocks[i]] for each i; zeros for a negative id."""
    pool = np.asarray(pool)
    return np.stack([pool[block] if block >= 0 else np.zeros_like(pool[0]) for block in blocks])


def scatter_blocks(pool: Any, staged: Any, blocks: Any) -> Array:
    """The pool after pool[blocks[i]] = staged[i]."""
    out = np.array(pool)
    for block, source in zip(blocks, staged, strict=True):
        if block >= 0:
            out[block] = source
    return out


# --- matmul by group --------------------------------------------------------------------------------------------


def grouped_matmul(lhs: Any, rhs: Any, group_offsets: Any) -> Array:
    """[rows, n]: each group's matrix times its rows of lhs; zeros for rows of no group."""
    out = np.zeros((lhs.shape[0], rhs.shape[1]))
    for group, (start, stop) in enumerate(pairwise(np.asarray(group_offsets).tolist())):
        if stop > start:
            out[start:stop] = wide(lhs[start:stop]) @ wide(rhs[group]).T
    return out


def grouped_matmul_gradients(lhs: Any, rhs: Any, group_offsets: Any, d_out: Any) -> tuple[Array, Array]:
    """Gradients with respect to lhs [rows, k] and rhs [groups, n, k], given that of the result."""
    d_lhs, d_rhs = np.zeros(lhs.shape), np.zeros(rhs.shape)
    for group, (start, stop) in enumerate(pairwise(np.asarray(group_offsets).tolist())):
        if stop > start:
            d_lhs[start:stop] = wide(d_out[start:stop]) @ wide(rhs[group])
            d_rhs[group] = wide(d_out[start:stop]).T @ wide(lhs[start:stop])
    return d_lhs, d_rhs


# --- matmul with narrow weights ---------------------------------------------------------------------------------


def quant_matmul(x: Any, codes: Any, scales: Any, zeros: Any = None) -> Array:
    """[rows, n]: x times the transposed weight."""
    return wide(x) @ decoded(codes, scales, zeros, columns=x.shape[1]).T


def decoded(codes: Any, scales: Any, zeros: Any = None, *, columns: int) -> Array:
    """The weight [n, columns] that the codes stand for."""
    codes = np.asarray(codes)
    values = wide(codes)
    if codes.shape[1] != columns:
        values = np.zeros((codes.shape[0], columns))
        for place in (0, 1):
            code = codes.view(np.uint8) // 16**place % 16
            values[:, place::2] = np.where(code < 8, code, code - 16.0) if codes.dtype == np.int8 else code
    group = columns // scales.shape[1]
    if zeros is not None:
        values = values - np.repeat(wide(zeros), group, axis=1)
    return values * np.repeat(wide(scales), group, axis=1)


# --- sampling ---------------------------------------------------------------------------------------------------


def sample(logits: Any, *, temperature: float, top_k: int, top_p: float, min_p: float, seed: int, position: int) -> int:
    """The token of one row of logits."""
    kept = survivors(logits, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    scores = wide(logits)
    if temperature > 0:
        scores = scores / temperature + gumbel(seed, position, scores.size)
    return int(np.argmax(np.where(kept, scores, -np.inf)))


def survivors(logits: Any, *, temperature: float, top_k: int, top_p: float, min_p: float, slack: float = 0.0) -> Array:
    """Which entries of a row the filters keep, bool [vocabulary]. `slack` above 0 widens min-p and top-p, below 0
    narrows them, to find entries so close to a limit that rounding decides."""
    x = wide(logits)
    kept = x > -np.inf
    if temperature == 0:
        return kept
    if min_p > 0:
        kept &= x >= x.max() + temperature * np.log(min_p) - slack
    if 0 < top_k < x.size:
        kept &= x >= np.sort(x)[-top_k]  # with all ties
    if top_p < 1:
        ids = np.flatnonzero(kept)
        order = ids[np.lexsort((-ids, -x[ids]))]  # from the largest down, equals by descending id
        weights = np.exp((x[order] - x.max()) / temperature)
        before = np.cumsum(weights) - weights
        dropped = before >= (top_p + slack) * weights.sum()
        dropped[0] = False
        kept[order[dropped]] = False
    return kept


def logprobs(logits: Any, kept: Array, *, temperature: float = 1.0) -> Array:
    """Log-softmax of the entries that are kept, after the temperature (none if 0); -inf for the others."""
    x = np.where(kept, wide(logits) / (temperature or 1.0), -np.inf)
    x = x - x.max()
    return x - np.log(np.exp(x).sum())


def gumbel(seed: int, position: int, size: int) -> Array:
    """The noise of (seed, position, id) for the ids 0 ... size - 1: a hash, made uniform, made Gumbel."""
    seeds, positions = np.array([seed], np.uint32), np.array([position], np.uint32)
    first = _mix(_mix(seeds ^ np.uint32(0x9E3779B9)) + positions * np.uint32(0x9E3779B1))
    second = _mix(_mix(seeds + np.uint32(0x85EBCA6B)) ^ _mix(positions + np.uint32(0xC2B2AE35)))
    bits = _mix(np.arange(size, dtype=np.uint32) * np.uint32(0x9E3779B1) + first, second)
    uniform = bits.astype(np.float32) * np.float32(2.0**-32) + np.float32(2.0**-33)
    return -np.log(-np.log1p(-np.minimum(uniform.astype(np.float64), 1 - 2.0**-24)))


def _mix(h: Array, key: Array | None = None) -> Array:
    h = h ^ (h >> np.uint32(16))
    h = h * np.uint32(0x7FEB352D)
    h = h ^ (h >> np.uint32(15))
    h = h if key is None else h ^ key
    h = h * np.uint32(0x846CA68B)
    return h ^ (h >> np.uint32(16))
