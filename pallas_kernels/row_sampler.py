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
and stops when the interval holds one distinct value.

A row that lies in memory is folded in lanes. The first pass also keeps the two best entries of every lane
(`Candidates`): when all survivors are among them, steps 3 to 5 run on those, which stay in registers, and the row is
not read again but for the mass that top-p alone needs. With 2048 lanes and survivors strewn evenly that fails for 50
of them in about 1 row of 200, for 100 in 1 of 25, for 300 in 2 of 3; then the passes run over the whole row.
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
    """One row of logits as float32; entries that do not exist are -inf."""

    size: int  # entries
    # fold(step, *initial scalars, enabled=True) -> accumulators [n]; not enabled, a fold need not run
    fold: Callable[..., tuple[jax.Array, ...]]
    at: Callable[[jax.Array], jax.Array]  # at(id) -> its logit
    in_lanes: bool  # folded in several steps: lane i of the accumulators sees entries i, n + i, 2n + i, ...


class Params(NamedTuple):
    """One row's parameters, scalars."""

    temperature: jax.Array  # float32; 0 is greedy
    top_k: jax.Array  # int32; 0 or less is off
    top_p: jax.Array  # float32; 1 is off
    min_p: jax.Array  # float32; 0 is off
    seed: jax.Array  # uint32
    position: jax.Array  # int32


class Survivors(NamedTuple):
    """The entries that passed the filters: above `value`, and those equal to it from id `first_tie` on."""

    value: jax.Array
    first_tie: jax.Array

    def keep(self, x: jax.Array, ids: jax.Array) -> jax.Array:
        return (x > -INF) & ((x > self.value) | ((x == self.value) & (ids >= self.first_tie)))


class Summary(NamedTuple):
    maximum: jax.Array
    argmax: jax.Array  # the lowest id among equals
    smallest: jax.Array  # of the finite values
    valid: jax.Array  # no NaN, no +inf, at least one finite value


class Candidates(NamedTuple):
    """The two best entries of every lane, as a row of its own, and the best value of all the other entries."""

    row: Row
    best_other: jax.Array


def sort_key(x: jax.Array) -> jax.Array:
    """float32 -> int32 with the same order; the two zeros are one."""
    bits = lax.bitcast_convert_type(jnp.where(x == 0.0, 0.0, x), jnp.int32)
    return bits ^ ((bits >> 31) & INT32_MAX)


def from_sort_key(key: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(key ^ ((key >> 31) & INT32_MAX), jnp.float32)


def take_best(best: jax.Array, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Vectors of running maxima and their ids -> the maximum and the lowest id that has it."""
    maximum = jnp.max(best)
    return maximum, jnp.min(jnp.where(best == maximum, ids, INT32_MAX))


def summarize(row: Row, *, want_candidates: bool = False) -> tuple[Summary, Candidates | None]:
    """The first pass. Only a row that is folded in lanes has candidates to keep."""

    def step(acc: tuple[jax.Array, ...], x: jax.Array, ids: jax.Array) -> tuple[jax.Array, ...]:
        best, best_id, smallest, bad, *more = acc
        better = x > best
        if more:
            second, second_id, other = more
            beats_second = x > second  # so does what beats the best
            more = [
                jnp.where(better, best, jnp.where(beats_second, x, second)),
                jnp.where(better, best_id, jnp.where(beats_second, ids, second_id)),
                jnp.maximum(other, jnp.where(beats_second, second, x)),
            ]
        return (
            jnp.where(better, x, best),
            jnp.where(better, ids, best_id),
            jnp.where(x > -INF, jnp.minimum(smallest, x), smallest),
            jnp.where((x != x) | (x == INF), 1, bad),
            *more,
        )

    lowest, nobody = jnp.float32(-INF), jnp.int32(0)
    keeps = (lowest, nobody, lowest) if want_candidates and row.in_lanes else ()
    best, best_id, smallest, bad, *more = row.fold(step, lowest, nobody, jnp.float32(INF), jnp.int32(0), *keeps)
    maximum, argmax = take_best(best, best_id)
    valid = (jnp.max(bad) == 0) & (maximum > -INF)
    # A row that is not valid still runs through the rest: give it numbers that end every loop.
    summary = Summary(
        jnp.where(valid, maximum, 0.0), jnp.where(valid, argmax, 0), jnp.where(valid, jnp.min(smallest), 0.0), valid
    )
    if not more:
        return summary, None
    second, second_id, other = more

    def fold(step: Step, *initial: jax.Array, enabled: Any = True) -> tuple[jax.Array, ...]:
        del enabled  # what is in registers costs next to nothing
        acc = tuple(jnp.full(best.shape, value, value.dtype) for value in initial)
        return step(step(acc, best, best_id), second, second_id)

    return summary, Candidates(Row(row.size, fold, row.at, in_lanes=False), jnp.max(other))


def search(
    row: Row,
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

    `values(x, ids)` are float32 or int32, as low and high; those below `low` are out of the search. One pivot halves
    the interval by representation, which bounds the passes whatever the values are; the others divide it evenly by
    value, which for logits converges fast. Not enabled: `low`, at no cost.
    """
    is_float = low.dtype == jnp.float32
    to_key, from_key = (sort_key, from_sort_key) if is_float else (lambda x: x, lambda key: key)
    highest, lowest = (INF, -INF) if is_float else (INT32_MAX, -INT32_MAX - 1)

    def thresholds(low: jax.Array, high: jax.Array) -> list[jax.Array]:
        width = lax.bitcast_convert_type(high - low, jnp.uint32)  # up to 2^32 - 1: exact in 32 bits, unsigned
        found = [low + lax.bitcast_convert_type(width // jnp.uint32(2), jnp.int32)]
        if is_float:
            bottom, top = from_key(low), from_key(high)
            found += [to_key(bottom + (top - bottom) * (j / pivots)) for j in range(1, pivots)]
        else:
            step = lax.bitcast_convert_type(width // jnp.uint32(pivots), jnp.int32)
            found += [low + step * j for j in range(1, pivots)]
        return [jnp.minimum(jnp.maximum(p, low + 1), high) for p in found]

    def narrow(state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        low, high, _, _ = state  # keys; the wanted one is in [low, high]
        tried = thresholds(low, high)
        low_value, high_value, *tried_values = (from_key(key) for key in (low, high, *tried))

        def step(acc: tuple[jax.Array, ...], x: jax.Array, ids: jax.Array) -> tuple[jax.Array, ...]:
            first, last, *sums = acc
            value, weight = values(x, ids), weights(x)
            inside = (value >= low_value) & (value <= high_value)  # closed: denormals compare as zero
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
    row: Row, *terms: Callable[[jax.Array, jax.Array], jax.Array], enabled: jax.Array | bool = True
) -> list[jax.Array]:
    """Sums of float32 terms(x, ids) over the row, in one pass; where not enabled they mean nothing."""

    def step(acc: tuple[jax.Array, ...], x: jax.Array, ids: jax.Array) -> tuple[jax.Array, ...]:
        return tuple(a + term(x, ids) for a, term in zip(acc, terms, strict=True))

    return [jnp.sum(a) for a in row.fold(step, *(jnp.float32(0),) * len(terms), enabled=enabled)]


def weight_of(maximum: jax.Array, inverse_temperature: jax.Array) -> Callable[[jax.Array], jax.Array]:
    """Unnormalised probability of a logit; 1 for the maximum."""
    return lambda x: jnp.exp((x - maximum) * inverse_temperature)


def filter_row(
    row: Row,
    params: Params,
    summary: Summary,
    *,
    pivots: int,
    enabled: jax.Array | bool = True,
    whole: Row | None = None,
) -> tuple[Survivors, jax.Array]:
    """min-p, then top-k, then top-p. Greedy rows keep everything. Not enabled: something, at no cost.

    `whole` is the row that `row` holds the candidates of. Then the result is right if every entry of it that is not
    in `row` is below the second thing returned.
    """
    sampled = (params.temperature > 0) & enabled
    temperature = jnp.where(sampled, params.temperature, 1.0)
    has_min_p, has_top_k = sampled & (params.min_p > 0), sampled & (params.top_k > 0) & (params.top_k < row.size)
    below = summary.maximum + temperature * jnp.log(jnp.where(has_min_p, params.min_p, 1.0))
    below = jnp.minimum(below, summary.maximum)  # rounding must not drop the best
    low = jnp.where(has_min_p, jnp.maximum(summary.smallest, below), summary.smallest)
    low = search(  # ties at the k-th value are kept
        row,
        values=lambda x, ids: x,
        weights=jnp.ones_like,
        target=params.top_k.astype(jnp.float32),
        low=low,
        high=summary.maximum,
        enabled=has_top_k,
        pivots=pivots,
    )

    # Kept: entries with less than p of the mass before them, seen from the top, so that the best is always kept.
    # Among equals at the boundary the higher ids come first: the order of a stable ascending sort.
    nucleus = sampled & (params.top_p < 1)
    weight = weight_of(summary.maximum, 1.0 / temperature)

    def mass_of(row: Row, enabled: jax.Array) -> jax.Array:
        return total(row, lambda x, ids: jnp.where(x >= low, weight(x), 0.0), enabled=enabled)[0]

    mass = mass_of(row, nucleus)
    if whole is not None:  # without top-k, candidates are not all that has mass
        mass = jnp.where(has_top_k, mass, mass_of(whole, nucleus & ~has_top_k))
    target = params.top_p * mass
    value = search(
        row,
        values=lambda x, ids: x,
        weights=weight,
        target=target,
        low=low,
        high=summary.maximum,
        enabled=nucleus,
        pivots=pivots,
    )
    above, ties = total(
        row,
        lambda x, ids: jnp.where(x > value, weight(x), 0.0),
        lambda x, ids: jnp.where(x == value, 1.0, 0.0),
        enabled=nucleus,
    )
    each = jnp.maximum(weight(value), jnp.float32(1e-38))
    kept_ties = jnp.maximum(jnp.ceil((target - above) / each), 1.0)
    first_tie = search(
        row,
        values=lambda x, ids: jnp.where(x == value, ids, -1),
        weights=lambda x: jnp.where(x == value, 1.0, 0.0),
        target=kept_ties,
        low=jnp.int32(0),
        high=jnp.int32(row.size - 1),
        enabled=nucleus & (ties > 1) & (kept_ties < ties),
        pivots=pivots,
    )
    # Top-p after top-k weighs all that top-k left; alone, it weighs the whole row, wherever its entries are.
    return Survivors(value, first_tie), jnp.where(has_top_k, low, value)


def keep_all(summary: Summary) -> Survivors:
    return Survivors(summary.smallest, jnp.int32(0))


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


def draw(
    row: Row, params: Params, summary: Summary, survivors: Survivors, *, enabled: jax.Array | bool = True
) -> jax.Array:
    """Gumbel-max over the survivors; greedy rows take the plain maximum. Not enabled: nothing to rely on."""
    sampled = params.temperature > 0
    inverse = 1.0 / jnp.where(sampled, params.temperature, 1.0)

    def step(acc: tuple[jax.Array, ...], x: jax.Array, ids: jax.Array) -> tuple[jax.Array, ...]:
        best, best_id = acc
        score = (x - summary.maximum) * inverse + gumbel_noise(params.seed, params.position, ids)
        score = jnp.where(survivors.keep(x, ids), score, -INF)
        better = score > best
        return jnp.where(better, score, best), jnp.where(better, ids, best_id)

    folded = row.fold(step, jnp.float32(-INF), jnp.int32(0), enabled=sampled & summary.valid & enabled)
    _, token = take_best(*folded)
    return jnp.where(sampled & summary.valid, token, summary.argmax)


def sample_row(row: Row, params: Params, *, mode: str, pivots: int) -> tuple[jax.Array, Summary, Survivors]:
    """One token. `mode` says what the row may ask for: "greedy", "random" (no filters) or "filtered"."""
    summary, candidates = summarize(row, want_candidates=mode == "filtered")
    if mode == "greedy":
        return summary.argmax, summary, keep_all(summary)
    if mode == "random":
        survivors = keep_all(summary)
        return draw(row, params, summary, survivors), summary, survivors
    if candidates is None:
        survivors, _ = filter_row(row, params, summary, pivots=pivots)
        return draw(row, params, summary, survivors), summary, survivors
    few, above = filter_row(candidates.row, params, summary, pivots=pivots, whole=row)
    enough = candidates.best_other < above
    many, _ = filter_row(row, params, summary, pivots=pivots, enabled=~enough)
    survivors = Survivors(*(jnp.where(enough, a, b) for a, b in zip(few, many, strict=True)))
    token = jnp.where(
        enough,
        draw(candidates.row, params, summary, survivors),
        draw(row, params, summary, survivors, enabled=~enough),
    )
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
