# SPDX-License-Identifier: Apache-2.0
"""Sampling one row of logits, written once for the kernel and for its twin.

Owns: the order of the filters, the threshold search, the noise. Knows a row only as something that can be folded
over (`Row`): the kernel folds chunk by chunk from memory, the twin in one piece.

1. maximum, smallest finite value, non-finite check                          one pass
2. min-p: a threshold below the maximum
3. top-k: search for the k-th largest value                                  about four passes
4. top-p: search for the value at which the mass from the top reaches p      about four passes
5. argmax of logit / temperature + Gumbel noise over the survivors           one pass

No sort: a search keeps an interval that holds the wanted value, tries some pivots inside in one pass over the row,
and stops when the interval holds one distinct value. Values are compared through an order-preserving map to int32.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

INT32_MAX = 2**31 - 1
INF = float("inf")

# step(accumulators, logits [n], ids [n]) -> accumulators; every accumulator is a vector [n]
type Step = Callable[[tuple[jax.Array, ...], jax.Array, jax.Array], tuple[jax.Array, ...]]


class Row(NamedTuple):
    """One row of logits as float32; entries that do not exist are -inf, zeros have no sign."""

    size: int  # entries
    # fold(step, *initial scalars, enabled=True) -> accumulators [n]; not enabled, a fold need not run
    fold: Callable[..., tuple[jax.Array, ...]]
    at: Callable[[jax.Array], jax.Array]  # at(id) -> its logit


class Params(NamedTuple):
    """One row's parameters, scalars."""

    temperature: jax.Array  # float32; 0 is greedy
    top_k: jax.Array  # int32; 0 or less is off
    top_p: jax.Array  # float32; 1 is off
    min_p: jax.Array  # float32; 0 is off
    seed: jax.Array  # uint32
    position: jax.Array  # int32


class Survivors(NamedTuple):
    """The entries that passed the filters: above `key`, and those equal to it from id `first_tie` on."""

    key: jax.Array
    first_tie: jax.Array

    def keep(self, x: jax.Array, ids: jax.Array) -> jax.Array:
        key = sort_key(x)
        return (x > -INF) & ((key > self.key) | ((key == self.key) & (ids >= self.first_tie)))


class Summary(NamedTuple):
    maximum: jax.Array
    argmax: jax.Array  # the lowest id among equals
    smallest: jax.Array  # of the finite values
    valid: jax.Array  # no NaN, no +inf, at least one finite value


def sort_key(x: jax.Array) -> jax.Array:
    """float32 -> int32 with the same order."""
    bits = lax.bitcast_convert_type(x, jnp.int32)
    return bits ^ ((bits >> 31) & INT32_MAX)


def from_sort_key(key: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(key ^ ((key >> 31) & INT32_MAX), jnp.float32)


def tidy(x: jax.Array) -> jax.Array:
    """Logits as the search wants them: float32, and no negative zero."""
    x = x.astype(jnp.float32)
    return jnp.where(x == 0.0, 0.0, x)


def take_best(best: jax.Array, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Vectors of running maxima and their ids -> the maximum and the lowest id that has it."""
    maximum = jnp.max(best)
    return maximum, jnp.min(jnp.where(best == maximum, ids, INT32_MAX))


def summarize(row: Row) -> Summary:
    def step(acc: tuple[jax.Array, ...], x: jax.Array, ids: jax.Array) -> tuple[jax.Array, ...]:
        best, best_id, smallest, bad = acc
        better = x > best
        return (
            jnp.where(better, x, best),
            jnp.where(better, ids, best_id),
            jnp.where(x > -INF, jnp.minimum(smallest, x), smallest),
            jnp.where((x != x) | (x == INF), 1, bad),
        )

    best, best_id, smallest, bad = row.fold(step, jnp.float32(-INF), jnp.int32(0), jnp.float32(INF), jnp.int32(0))
    maximum, argmax = take_best(best, best_id)
    valid = (jnp.max(bad) == 0) & (maximum > -INF)
    # A row that is not valid still runs through the rest: give it numbers that end every loop.
    return Summary(
        jnp.where(valid, maximum, 0.0), jnp.where(valid, argmax, 0), jnp.where(valid, jnp.min(smallest), 0.0), valid
    )


def search(
    row: Row,
    *,
    keys: Callable[[jax.Array, jax.Array], jax.Array],
    weights: Callable[[jax.Array], jax.Array],
    target: jax.Array,
    low: jax.Array,
    high: jax.Array,
    enabled: jax.Array,
    pivots: int,
    linear: bool,
) -> jax.Array:
    """The largest key v in [low, high] with sum(weights of keys >= v) >= target; `low` if there is none.

    `keys(x, ids)` gives int32 keys, those below `low` are out of the search. Half of the pivots divide the interval
    of keys evenly, which bounds the passes; with `linear` the others divide the values evenly, which for logits
    converges about twice as fast. Not enabled: `low`, at no cost.
    """
    by_value = pivots // 2 if linear else 0
    by_key = pivots - by_value

    def thresholds(low: jax.Array, high: jax.Array) -> list[jax.Array]:
        width = lax.bitcast_convert_type(high - low, jnp.uint32)  # up to 2^32 - 1: exact in 32 bits, unsigned
        step = lax.bitcast_convert_type(width // jnp.uint32(by_key + 1), jnp.int32)
        found = [low + step * (j + 1) for j in range(by_key)]
        bottom, top = from_sort_key(low), from_sort_key(high - 1)
        found += [sort_key(bottom + (top - bottom) * ((j + 1) / (by_value + 1))) for j in range(by_value)]
        return [jnp.minimum(jnp.maximum(p, low + 1), high - 1) for p in found]

    def narrow(state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        low, high, _, _ = state  # the wanted key is in [low, high)
        tried = thresholds(low, high)

        def step(acc: tuple[jax.Array, ...], x: jax.Array, ids: jax.Array) -> tuple[jax.Array, ...]:
            first, last, *sums = acc
            key, weight = keys(x, ids), weights(x)
            inside = (key >= low) & (key < high)
            return (
                jnp.where(inside, jnp.minimum(first, key), first),
                jnp.where(inside, jnp.maximum(last, key), last),
                *(s + jnp.where(key >= p, weight, 0.0) for s, p in zip(sums, tried, strict=True)),
            )

        first, last, *sums = row.fold(
            step, jnp.int32(INT32_MAX), jnp.int32(-INT32_MAX - 1), *(jnp.float32(0),) * pivots
        )
        first, last = jnp.min(first), jnp.max(last)
        next_low, next_high = low, high
        for p, s in zip(tried, sums, strict=True):
            reached = jnp.sum(s) >= target
            next_low = jnp.where(reached, jnp.maximum(next_low, p), next_low)
            next_high = jnp.where(reached, next_high, jnp.minimum(next_high, p))
        found = jnp.where(first <= last, first, low)
        return next_low, next_high, found, first >= last

    _, _, found, _ = lax.while_loop(
        lambda state: ~state[3], narrow, (low, high + 1, low, ~enabled & jnp.full((), True))
    )
    return found


def total(
    row: Row, *terms: Callable[[jax.Array, jax.Array], jax.Array], enabled: jax.Array | bool = True
) -> list[jax.Array]:
    """Sums of float32 terms(x, ids) over the row, in one pass; where not enabled they mean nothing."""

    def step(acc: tuple[jax.Array, ...], x: jax.Array, ids: jax.Array) -> tuple[jax.Array, ...]:
        return tuple(a + term(x, ids) for a, term in zip(acc, terms, strict=True))

    return [jnp.sum(a) for a in row.fold(step, *(jnp.float32(0),) * len(terms), enabled=enabled)]


def weight_of(maximum: jax.Array, inverse_temperature: jax.Array) -> Callable[[jax.Array], jax.Array]:
    """Unnormalised probability of a logit; 1 for the maximum."""
    return lambda x: jnp.exp((x - maximum) * inverse_temperature)


def filter_row(row: Row, params: Params, summary: Summary, *, pivots: int) -> Survivors:
    """min-p, then top-k, then top-p. Greedy rows keep everything."""
    sampled = params.temperature > 0
    temperature = jnp.where(sampled, params.temperature, 1.0)
    top = sort_key(summary.maximum)
    low = sort_key(summary.smallest)
    has_min_p = sampled & (params.min_p > 0)
    below = summary.maximum + temperature * jnp.log(jnp.where(has_min_p, params.min_p, 1.0))
    low = jnp.where(has_min_p, jnp.maximum(low, jnp.minimum(sort_key(tidy(below)), top)), low)

    def value_key(x: jax.Array, ids: jax.Array) -> jax.Array:
        return sort_key(x)

    low = search(  # ties at the k-th value are kept
        row,
        keys=value_key,
        weights=lambda x: jnp.where(x > -INF, 1.0, 0.0),
        target=params.top_k.astype(jnp.float32),
        low=low,
        high=top,
        enabled=sampled & (params.top_k > 0) & (params.top_k < row.size),
        pivots=pivots,
        linear=True,
    )

    # Kept: entries with less than p of the mass before them, seen from the top, so that the best is always kept.
    # Among equals at the boundary the higher ids come first: the order of a stable ascending sort.
    nucleus = sampled & (params.top_p < 1)
    weight = weight_of(summary.maximum, 1.0 / temperature)
    [mass] = total(row, lambda x, ids: jnp.where(sort_key(x) >= low, weight(x), 0.0), enabled=nucleus)
    target = params.top_p * mass
    key = search(
        row,
        keys=value_key,
        weights=weight,
        target=target,
        low=low,
        high=top,
        enabled=nucleus,
        pivots=pivots,
        linear=True,
    )
    above, ties = total(
        row,
        lambda x, ids: jnp.where(sort_key(x) > key, weight(x), 0.0),
        lambda x, ids: jnp.where(sort_key(x) == key, 1.0, 0.0),
        enabled=nucleus,
    )
    each = jnp.maximum(weight(from_sort_key(key)), jnp.float32(1e-38))
    kept_ties = jnp.maximum(jnp.ceil((target - above) / each), 1.0)
    first_tie = search(
        row,
        keys=lambda x, ids: jnp.where(sort_key(x) == key, ids, -1),
        weights=lambda x: jnp.where(sort_key(x) == key, 1.0, 0.0),
        target=kept_ties,
        low=jnp.int32(0),
        high=jnp.int32(row.size - 1),
        enabled=nucleus & (ties > 1) & (kept_ties < ties),
        pivots=pivots,
        linear=False,
    )
    return Survivors(key, first_tie)


def keep_all(summary: Summary) -> Survivors:
    return Survivors(sort_key(summary.smallest), jnp.int32(0))


def _mix(h: jax.Array, key: jax.Array | None = None) -> jax.Array:
    """A 32-bit finaliser with low bias; a key changes it half-way."""
    h = h ^ (h >> 16)
    h = h * jnp.uint32(0x7FEB352D)
    h = h ^ (h >> 15) if key is None else h ^ (h >> 15) ^ key
    h = h * jnp.uint32(0x846CA68B)
    return h ^ (h >> 16)


def gumbel_noise(seed: jax.Array, position: jax.Array, ids: jax.Array) -> jax.Array:
    """Gumbel noise as a function of (seed, position, id) alone: no state, so a replay draws the same.

    `seed` and `position` are scalars, or broadcast against `ids`.
    """
    position = lax.convert_element_type(position, jnp.uint32)
    first = _mix(_mix(seed ^ jnp.uint32(0x9E3779B9)) + position * jnp.uint32(0x9E3779B1))
    second = _mix(_mix(seed + jnp.uint32(0x85EBCA6B)) ^ _mix(position + jnp.uint32(0xC2B2AE35)))
    bits = _mix(lax.convert_element_type(ids, jnp.uint32) * jnp.uint32(0x9E3779B1) + first, second)
    # E = -log(1 - u) is exponential. Small u make large noise, and float32 is finest near 0: the upper tail
    # reaches 22.9, where noise from -log(u) would stop at 17 and never draw what is rarer than 1e-7.
    uniform = bits.astype(jnp.float32) * 2.0**-32 + 2.0**-33
    exponential = -jnp.log1p(-jnp.minimum(uniform, 1.0 - 2.0**-24))
    return -jnp.log(exponential)


def draw(row: Row, params: Params, summary: Summary, survivors: Survivors) -> jax.Array:
    """Gumbel-max over the survivors; greedy rows take the plain maximum."""
    sampled = params.temperature > 0
    inverse = 1.0 / jnp.where(sampled, params.temperature, 1.0)

    def step(acc: tuple[jax.Array, ...], x: jax.Array, ids: jax.Array) -> tuple[jax.Array, ...]:
        best, best_id = acc
        score = (x - summary.maximum) * inverse + gumbel_noise(params.seed, params.position, ids)
        score = jnp.where(survivors.keep(x, ids), score, -INF)
        better = score > best
        return jnp.where(better, score, best), jnp.where(better, ids, best_id)

    _, token = take_best(*row.fold(step, jnp.float32(-INF), jnp.int32(0)))
    return jnp.where(sampled & summary.valid, token, summary.argmax)


def sample_row(row: Row, params: Params, *, mode: str, pivots: int) -> tuple[jax.Array, Summary, Survivors]:
    """One token. `mode` says what the row may ask for: "greedy", "random" (no filters) or "filtered"."""
    summary = summarize(row)
    survivors = filter_row(row, params, summary, pivots=pivots) if mode == "filtered" else keep_all(summary)
    token = summary.argmax if mode == "greedy" else draw(row, params, summary, survivors)
    return token, summary, survivors


class Likelihood(NamedTuple):
    """Log-probability of one entry and its rank (1 = best; strictly greater entries + 1), and what scales them."""

    logprob: jax.Array
    rank: jax.Array
    normalizer: Callable[[jax.Array], jax.Array]  # logit -> logprob


def likelihood(
    row: Row, token: jax.Array, summary: Summary, survivors: Survivors, inverse_temperature: jax.Array
) -> Likelihood:
    """Log-softmax over the survivors at one entry."""
    value = row.at(token)
    weight = weight_of(summary.maximum, inverse_temperature)
    mass, greater = total(
        row,
        lambda x, ids: jnp.where(survivors.keep(x, ids), weight(x), 0.0),
        lambda x, ids: jnp.where(survivors.keep(x, ids) & (x > value), 1.0, 0.0),
    )
    log_mass = jnp.log(mass)

    def normalizer(x: jax.Array) -> jax.Array:
        return (x - summary.maximum) * inverse_temperature - log_mass

    return Likelihood(normalizer(value), greater.astype(jnp.int32) + 1, normalizer)


def next_best(row: Row, survivors: Survivors, after: tuple[Any, Any]) -> tuple[jax.Array, jax.Array]:
    """The best survivor behind (value, id) in descending order, equals by ascending id; (-inf, -1) at the end."""
    value, position = after

    def step(acc: tuple[jax.Array, ...], x: jax.Array, ids: jax.Array) -> tuple[jax.Array, ...]:
        best, best_id = acc
        behind = (x < value) | ((x == value) & (ids > position))
        better = survivors.keep(x, ids) & behind & (x > best)
        return jnp.where(better, x, best), jnp.where(better, ids, best_id)

    best, token = take_best(*row.fold(step, jnp.float32(-INF), jnp.int32(INT32_MAX)))
    return best, jnp.where(best > -INF, token, -1)
