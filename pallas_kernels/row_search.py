# SPDX-License-Identifier: Apache-2.0
"""Passes over one row of logits: fold it, sum over it, and find a threshold in it without sorting.

A row is known only as something that can be folded. The kernel folds a row of device memory chunk by chunk, the CPU
code folds a whole array at once, and both run the same functions.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

INT32_MAX = 2**31 - 1
INF = float("inf")

# step(accumulators, logits [n], ids [n]) -> accumulators; every accumulator is a vector [n]
type FoldStep = Callable[[tuple[jax.Array, ...], jax.Array, jax.Array], tuple[jax.Array, ...]]


class LogitsRow(NamedTuple):
    """One row of logits as float32; entries that do not exist are -inf."""

    size: int  # entries
    # fold(step, *initial scalars, enabled=True) -> accumulators [n]; if not enabled, the result is not used
    fold: Callable[..., tuple[jax.Array, ...]]
    at: Callable[[jax.Array], jax.Array]  # at(id) -> its logit
    in_lanes: bool  # folded in several steps: lane i of the accumulators sees entries i, n + i, 2n + i, ...


def sort_key(x: jax.Array) -> jax.Array:
    """float32 -> int32 in the same order; -0.0 and 0.0 have one key."""
    bits = lax.bitcast_convert_type(jnp.where(x == 0.0, 0.0, x), jnp.int32)
    return bits ^ ((bits >> 31) & INT32_MAX)


def from_sort_key(key: jax.Array) -> jax.Array:
    """The inverse of `sort_key`."""
    return lax.bitcast_convert_type(key ^ ((key >> 31) & INT32_MAX), jnp.float32)


def take_best(best: jax.Array, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The maximum of a vector of running maxima, and the lowest of the ids that have it."""
    maximum = jnp.max(best)
    return maximum, jnp.min(jnp.where(best == maximum, ids, INT32_MAX))


def search(
    row: LogitsRow,
    *,
    values: Callable[[jax.Array, jax.Array], jax.Array],
    weights: Callable[[jax.Array], jax.Array],
    target: jax.Array,
    low: jax.Array,
    high: jax.Array,
    enabled: jax.Array,
    pivots: int,
) -> jax.Array:
    """The largest value v in [low, high] with sum(weights of values >= v) >= target; `low` if there is none.

    `values(x, ids)` are float32 or int32 like low and high; values below `low` do not take part. The search keeps an
    interval that holds the wanted value, tries `pivots` thresholds in it in one pass over the row, and stops when the
    interval holds one distinct value. One pivot halves the interval by representation, which bounds the number of
    passes for any values; the others divide it evenly by value, which converges fast for logits. If not `enabled`,
    the result is `low`, without a pass.
    """
    is_float = low.dtype == jnp.float32
    to_key, from_key = (sort_key, from_sort_key) if is_float else (lambda x: x, lambda key: key)
    highest, lowest = (INF, -INF) if is_float else (INT32_MAX, -INT32_MAX - 1)

    def thresholds(low: jax.Array, high: jax.Array) -> list[jax.Array]:
        width = lax.bitcast_convert_type(high - low, jnp.uint32)  # up to 2^32 - 1: exact as an unsigned number
        found = [low + lax.bitcast_convert_type(width // jnp.uint32(2), jnp.int32)]
        if is_float:
            bottom, top = from_key(low), from_key(high)
            found += [to_key(bottom + (top - bottom) * (j / pivots)) for j in range(1, pivots)]
        else:
            step = lax.bitcast_convert_type(width // jnp.uint32(pivots), jnp.int32)
            found += [low + step * j for j in range(1, pivots)]
        return [jnp.minimum(jnp.maximum(p, low + 1), high) for p in found]

    def narrow(state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        low, high, _, _ = state  # keys; the wanted key is in [low, high]
        tried = thresholds(low, high)
        low_value, high_value, *tried_values = (from_key(key) for key in (low, high, *tried))

        def step(acc: tuple[jax.Array, ...], x: jax.Array, ids: jax.Array) -> tuple[jax.Array, ...]:
            first, last, *sums = acc
            value, weight = values(x, ids), weights(x)
            inside = (value >= low_value) & (value <= high_value)  # inclusive, as denormals may compare as zero
            return (
                jnp.where(inside, jnp.minimum(first, value), first),
                jnp.where(inside, jnp.maximum(last, value), last),
                *(s + jnp.where(value >= p, weight, 0.0) for s, p in zip(sums, tried_values, strict=True)),
            )

        edges = (jnp.asarray(edge, low_value.dtype) for edge in (highest, lowest))
        first, last, *sums = row.fold(step, *edges, *(jnp.float32(0),) * pivots)
        first, last = jnp.min(first), jnp.max(last)
        next_low, next_high = low, high
        for p, s in zip(tried, sums, strict=True):
            reached = jnp.sum(s) >= target
            next_low = jnp.where(reached, jnp.maximum(next_low, p), next_low)
            next_high = jnp.where(reached, next_high, jnp.minimum(next_high, p - 1))
        found = jnp.where(first <= last, to_key(first), low)
        return next_low, next_high, found, first >= last

    start = to_key(low)
    initial = (start, to_key(high), start, ~enabled & jnp.full((), True))
    _, _, found, _ = lax.while_loop(lambda state: ~state[3], narrow, initial)
    return from_key(found)


def total(
    row: LogitsRow, *terms: Callable[[jax.Array, jax.Array], jax.Array], enabled: jax.Array | bool = True
) -> list[jax.Array]:
    """Sums of float32 terms(x, ids) over the row, in one pass; meaningless if not `enabled`."""

    def step(acc: tuple[jax.Array, ...], x: jax.Array, ids: jax.Array) -> tuple[jax.Array, ...]:
        return tuple(a + term(x, ids) for a, term in zip(acc, terms, strict=True))

    return [jnp.sum(a) for a in row.fold(step, *(jnp.float32(0),) * len(terms), enabled=enabled)]
