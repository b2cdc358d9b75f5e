# SPDX-License-Identifier: Apache-2.0
"""The attention loop of CPUs, in jax.numpy, shared by paged and latent attention.

It loops over rows, over tiles of query tokens, and over chunks of KV blocks. Every trip count is read from the batch,
so the work follows the tokens that exist and not the width of the block table: gathering the whole table was 5 to 20
times slower at short contexts. One row's result does not depend on other rows, except for rounding: where a token's KV
is narrow, decode rows of similar length are computed a few at a time.

The loop does not know what a block holds: an op passes `read`. Products of bfloat16 KV are those of bfloat16 values,
summed in float32, which the matrix units of newer CPUs compute about twice as fast; all other arithmetic is float32.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.ragged import Ragged

NEG = -1e30
# Query tokens per tile of a ragged row, and per last tile if no more are left. The short tile made 8 rows of 30 tokens
# after a cached prefix of 512 take two thirds of the time.
QUERY_TILE, SHORT_TILE = 128, 32
# KV tokens per loop step: first as many as fill half a MiB, then, so that short rows waste little, as many as the tile
# has queries, or SMALL_CHUNK if those are few. A step costs tens of microseconds however small it is, more with many
# query tokens. On two cores these values were about the best of those tried, up to 1 MiB.
LARGE_CHUNK_BYTES = 2**19
SMALL_CHUNK = 96
# Decode rows that are computed together if a token's KV is so narrow that a single row is mostly overhead. With 12 KV
# heads of 64, single rows are faster: 1.5 against 2.2 ms for 32 rows of 80 tokens.
GROUP, GROUP_CHUNK, GROUP_BELOW_COLUMNS = 8, 128, 512


class Chunk(NamedTuple):
    """KV tokens of some blocks, heads first, with their scales applied, in the dtype that `product_dtype` chose."""

    keys: jax.Array  # [kv_heads, tokens, key_dim]
    values: jax.Array  # [kv_heads, tokens, value_dim]


class RowChunks(NamedTuple):
    """Chunks of several rows, tokens first as in the pool, so that nothing is transposed."""

    keys: jax.Array  # [rows, tokens, kv_heads * key_dim]
    values: jax.Array  # [rows, tokens, kv_heads * value_dim]


class AttentionCall(NamedTuple):
    """What all rows of a call have in common; the options are those of `pallas_kernels.paged_attention`."""

    kv_heads: int
    value_dim: int
    block_size: int
    scale: float
    window: int | None = None
    soft_cap: float | None = None
    sinks: jax.Array | None = None


type ReadChunk = Callable[[jax.Array], Chunk]  # block ids [n] -> Chunk
type ReadRows = Callable[[jax.Array], RowChunks]  # block ids [rows, n] -> RowChunks


def product_dtype(q: jax.Array, pool: jax.Array) -> jnp.dtype:
    """The dtype of what is multiplied: bfloat16 if all of it is, else float32."""
    bfloat16 = jnp.dtype(jnp.bfloat16)
    return bfloat16 if q.dtype == pool.dtype == bfloat16 else jnp.dtype(jnp.float32)


def _multiply(expression: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """An einsum with float32 results of a [batch, rows, ...], in the dtype of b."""
    a, rows = a.astype(b.dtype), a.shape[1]
    if rows == 1 and b.dtype != jnp.float32:
        a = jnp.pad(a, ((0, 0), (0, 1), (0, 0)))  # XLA has no fast 16-bit product of a vector
    return jnp.einsum(expression, a, b, preferred_element_type=jnp.float32)[:, :rows]


def _scores(expression: str, queries: jax.Array, keys: jax.Array, scale: float) -> jax.Array:
    if keys.dtype == jnp.float32:
        return _multiply(expression, queries.astype(jnp.float32) * scale, keys)
    return _multiply(expression, queries, keys) * scale  # scaled queries would be rounded again


def chunk_blocks(block_size: int, columns: int, query_tile: int) -> tuple[int, int]:
    """Blocks per large and per small chunk; `columns` is kv_heads * dim of a token."""
    # A row alone is summed in the same chunks as a row in a group.
    narrow = columns < GROUP_BELOW_COLUMNS
    few = GROUP_CHUNK if narrow else SMALL_CHUNK
    small = max(1, (few if query_tile <= SHORT_TILE else query_tile) // block_size)
    return max(small, LARGE_CHUNK_BYTES // (4 * columns * block_size)), small


def _attend_tile(
    query: jax.Array,
    positions: jax.Array,
    blocks: jax.Array,
    start: jax.Array,
    stop: jax.Array,
    *,
    attention: AttentionCall,
    longest: int,
    read: ReadChunk,
) -> jax.Array:
    """One tile of one row: query [kv_heads, group, tile, dim] against the KV tokens [start, stop). `longest` is the
    most blocks that a row can have."""
    kv_heads, group, tile, dim = query.shape
    block_size, soft_cap, window, sinks = attention.block_size, attention.soft_cap, attention.window, attention.sinks
    flat = query.reshape(kv_heads, group * tile, dim)
    where = jnp.broadcast_to(positions[None, :], (group, tile)).reshape(-1)

    def step(first: jax.Array, per_chunk: int, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        maximum, total, out = state
        chunk = read(lax.dynamic_slice(blocks, (first,), (per_chunk,)))
        token = first * block_size + jnp.arange(per_chunk * block_size, dtype=jnp.int32)
        exists = (token >= start) & (token < stop)
        # Slots that were never written may hold NaN, which a weight of zero does not cancel: zero the values.
        values = jnp.where(exists[None, :, None], chunk.values, jnp.zeros((), chunk.values.dtype))
        scores = _scores("hrd,htd->hrt", flat, chunk.keys, attention.scale)
        if soft_cap is not None:
            scores = jnp.tanh(scores / soft_cap) * soft_cap
        visible = exists[None, :] & (token[None, :] <= where[:, None])
        if window is not None:
            visible = visible & (token[None, :] > where[:, None] - window)
        scores = jnp.where(visible[None], scores, NEG)
        new_maximum = jnp.maximum(maximum, scores.max(-1))
        rescale = jnp.exp(maximum - new_maximum)
        weights = jnp.exp(scores - new_maximum[..., None])
        out = out * rescale[..., None] + _multiply("hrt,htd->hrd", weights, values)
        return new_maximum, total * rescale + weights.sum(-1), out

    rows = (kv_heads, group * tile)
    maximum, total = jnp.full(rows, NEG, jnp.float32), jnp.zeros(rows, jnp.float32)
    if sinks is not None:
        by_head = jnp.broadcast_to(sinks.reshape(kv_heads, group, 1), (kv_heads, group, tile)).reshape(rows)
        maximum, total = by_head, jnp.where(stop > 0, 1.0, total)
    out = jnp.zeros((*rows, attention.value_dim), jnp.float32)
    state = (maximum, total, out)
    first, end = start // block_size, (stop + block_size - 1) // block_size
    large, small = chunk_blocks(block_size, kv_heads * dim, tile)
    rest_first = first
    if longest >= large:
        whole = jnp.maximum(end - first, 0) // large
        state = lax.fori_loop(0, whole, lambda i, s: step(first + i * large, large, s), state)
        rest_first = first + whole * large
    rest = (jnp.maximum(end - rest_first, 0) + small - 1) // small
    _, total, out = lax.fori_loop(0, rest, lambda i, s: step(rest_first + i * small, small, s), state)
    out = out / jnp.where(total > 0, total, 1.0)[..., None]
    return out.reshape(kv_heads, group, tile, attention.value_dim)


def _attend_group(
    query: jax.Array,
    blocks: jax.Array,
    lengths: jax.Array,
    *,
    attention: AttentionCall,
    read_rows: ReadRows,
) -> jax.Array:
    """One query token of each of a few rows, [rows, heads, dim], over all of their KV; the longest sets the chunks."""
    count, heads, dim = query.shape
    kv_heads, value_dim, block_size, scale, window, soft_cap, sinks = attention
    group, per_chunk = heads // kv_heads, max(1, GROUP_CHUNK // block_size)
    # Queries as a block-diagonal matrix, zero for the other KV heads: one product multiplies all heads with the keys as
    # they lie in memory. It does several times the multiplications, but those are not what takes the time.
    own = jnp.eye(kv_heads, dtype=query.dtype)[None, :, None, :, None]
    spread = (query.reshape(count, kv_heads, group, 1, dim) * own).reshape(count, heads, kv_heads * dim)
    starts = jnp.zeros_like(lengths) if window is None else jnp.maximum(lengths - window, 0)

    def step(i: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        maximum, total, out = state
        keys, values = read_rows(lax.dynamic_slice(blocks, (0, i * per_chunk), (count, per_chunk)))
        token = i * per_chunk * block_size + jnp.arange(per_chunk * block_size, dtype=jnp.int32)
        visible = (token[None] >= starts[:, None]) & (token[None] < lengths[:, None])
        values = jnp.where(visible[:, :, None], values, jnp.zeros((), values.dtype))  # as in _attend_tile
        scores = _scores("rhk,rtk->rht", spread, keys, scale)
        if soft_cap is not None:
            scores = jnp.tanh(scores / soft_cap) * soft_cap
        scores = jnp.where(visible[:, None], scores, NEG)
        new_maximum = jnp.maximum(maximum, scores.max(-1))
        rescale, weights = jnp.exp(maximum - new_maximum), jnp.exp(scores - new_maximum[..., None])
        weights = jnp.where(visible[:, None], weights, 0.0)  # for rows that have no tokens in this chunk
        every = _multiply("rht,rtk->rhk", weights, values).reshape(count, kv_heads, group, kv_heads, value_dim)
        new = jnp.stack([every[:, head, :, head] for head in range(kv_heads)], axis=1).reshape(out.shape)
        return new_maximum, total * rescale + weights.sum(-1), out * rescale[..., None] + new

    maximum, total = jnp.full((count, heads), NEG, jnp.float32), jnp.zeros((count, heads), jnp.float32)
    if sinks is not None:
        maximum, total = jnp.broadcast_to(sinks, maximum.shape), jnp.where(lengths[:, None] > 0, 1.0, total)
    state = (maximum, total, jnp.zeros((count, heads, value_dim), jnp.float32))
    tokens_per_chunk = per_chunk * block_size
    first, last = starts.min() // tokens_per_chunk, (lengths.max() + tokens_per_chunk - 1) // tokens_per_chunk
    _, total, out = lax.fori_loop(first, last, step, state)
    return out / jnp.where(total > 0, total, 1.0)[..., None]


def _decode_in_groups(
    queries: jax.Array,
    tables: jax.Array,
    kv_lens: jax.Array,
    rows: jax.Array,
    *,
    attention: AttentionCall,
    alone: Callable[[jax.Array], jax.Array],
    read_rows: ReadRows,
) -> jax.Array:
    """The decode rows [0, rows) in groups of similar length, which takes few steps and uses all cores. If the lengths
    in a group differ much, each row runs `alone`, so that the work still follows the tokens. The result has
    [kv_lens, heads, value_dim]."""
    count = min(GROUP, len(kv_lens))
    padding = -len(kv_lens) % count
    lengths = jnp.where(jnp.arange(len(kv_lens), dtype=jnp.int32) < rows, kv_lens, 0)
    order = jnp.argsort(-lengths).astype(jnp.int32)
    places = jnp.pad(order, (0, padding), constant_values=0)
    lengths = jnp.pad(lengths[order], (0, padding))  # the longest first, zeros last

    def group(i: jax.Array, out: jax.Array) -> jax.Array:
        at = lax.dynamic_slice(places, (i * count,), (count,))
        lens = lax.dynamic_slice(lengths, (i * count,), (count,))
        shortest = jnp.where(lens > 0, lens, lens[0]).min()

        def together() -> jax.Array:
            query = queries.at[at].get(mode="clip")
            return _attend_group(query, tables[at], lens, attention=attention, read_rows=read_rows)

        def apart() -> jax.Array:
            return lax.map(lambda r: alone(r)[0], at)

        result = lax.cond(lens[0] <= 2 * shortest + GROUP_CHUNK, together, apart)
        result = jnp.where((lens > 0)[:, None, None], result, 0.0)
        return lax.dynamic_update_slice(out, result, (i * count, 0, 0))

    heads = queries.shape[1]
    out = jnp.zeros((len(places), heads, attention.value_dim), jnp.float32)
    out = lax.fori_loop(0, (rows + count - 1) // count, group, out)
    return out[jnp.argsort(order)]


def attend(
    q: jax.Array,
    ragged: Ragged,
    attention: AttentionCall,
    *,
    read: ReadChunk,
    read_rows: ReadRows | None = None,
) -> jax.Array:
    """Attention of every row; zeros for the tokens of no row. Returns [tokens, heads, value_dim] in q's dtype."""
    tokens, heads, dim = q.shape
    kv_heads, value_dim, window = attention.kv_heads, attention.value_dim, attention.window
    group = heads // kv_heads
    block_tables, kv_lens, cu_q_lens, distribution = ragged.arrays().values()
    # JAX would shift a slice that runs over an edge: pad both arrays.
    query_tile = min(QUERY_TILE, tokens)
    short_tile = SHORT_TILE if query_tile > SHORT_TILE else 0
    over = max(chunk_blocks(attention.block_size, kv_heads * dim, tile)[0] for tile in (1, query_tile))
    tables = jnp.pad(block_tables, ((0, 0), (0, over)))
    queries = jnp.pad(q, ((0, query_tile), (0, 0), (0, 0)))

    def one_tile(r: jax.Array, offset: jax.Array, tile: int) -> jax.Array:
        begin, count, kv_len = cu_q_lens[r], cu_q_lens[r + 1] - cu_q_lens[r], kv_lens[r]
        query = lax.dynamic_slice(queries, (begin + offset, 0, 0), (tile, heads, dim))
        query = query.reshape(tile, kv_heads, group, dim).transpose(1, 2, 0, 3)
        position = kv_len - count + offset
        result = _attend_tile(
            query,
            position + jnp.arange(tile, dtype=jnp.int32),
            tables[r],
            jnp.int32(0) if window is None else jnp.maximum(position - window + 1, 0),
            jnp.minimum(kv_len, position + tile),
            attention=attention,
            longest=block_tables.shape[1],
            read=read,
        )
        return result.transpose(2, 0, 1, 3).reshape(tile, heads, value_dim)

    def decode_rows(out: jax.Array) -> jax.Array:
        def row(r: jax.Array, out: jax.Array) -> jax.Array:
            return lax.dynamic_update_slice(out, one_tile(r, jnp.int32(0), 1), (cu_q_lens[r], 0, 0))

        # XLA's CPU compiler does not unroll a loop of one round.
        return (
            row(jnp.int32(0), out)
            if ragged.decode_only and tokens == 1
            else lax.fori_loop(0, distribution[0], row, out)
        )

    def ragged_rows(out: jax.Array, tile: int, tiles: Callable[[jax.Array], tuple[jax.Array, jax.Array]]) -> jax.Array:
        """The ragged rows, each from the first to before the last tile that `tiles` gives for its token count."""

        def row(r: jax.Array, out: jax.Array) -> jax.Array:
            count = cu_q_lens[r + 1] - cu_q_lens[r]

            def put(i: jax.Array, out: jax.Array) -> jax.Array:
                place = (cu_q_lens[r] + i * tile, 0, 0)
                own = i * tile + jnp.arange(tile, dtype=jnp.int32) < count  # the other tokens are of later rows
                before = lax.dynamic_slice(out, place, (tile, heads, value_dim))
                new = jnp.where(own[:, None, None], one_tile(r, i * tile, tile), before)
                return lax.dynamic_update_slice(out, new, place)

            return lax.fori_loop(*tiles(count), put, out)

        return lax.fori_loop(distribution[0], distribution[1], row, out)

    def long_tiles(count: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jnp.zeros_like(count), count // query_tile + (count % query_tile > short_tile).astype(jnp.int32)

    def last_short_tile(count: jax.Array) -> tuple[jax.Array, jax.Array]:
        rest = count % query_tile
        first = (count - rest) // SHORT_TILE  # exact: if query_tile is below QUERY_TILE, the rest is all there is
        return first, first + ((rest > 0) & (rest <= SHORT_TILE)).astype(jnp.int32)

    out = jnp.zeros((tokens + query_tile, heads, value_dim), jnp.float32)
    if read_rows is None or kv_heads * dim >= GROUP_BELOW_COLUMNS or min(len(kv_lens), tokens) == 1:
        out = decode_rows(out)
    else:
        alone = partial(one_tile, offset=jnp.int32(0), tile=1)
        grouped = _decode_in_groups(
            queries, tables, kv_lens, distribution[0], attention=attention, alone=alone, read_rows=read_rows
        )
        out = lax.dynamic_update_slice(out, grouped[:tokens], (0, 0, 0))
    if not ragged.decode_only:
        out = ragged_rows(out, query_tile, long_tiles)
        if short_tile:
            out = ragged_rows(out, short_tile, last_short_tile)
    exists = jnp.arange(tokens, dtype=jnp.int32) < cu_q_lens[distribution[1]]
    return jnp.where(exists[:, None, None], out[:tokens], 0.0).astype(q.dtype)
