# SPDX-License-Identifier: Apache-2.0
"""Sample one row of logits: the filters, the noise and the log probabilities, shared by the kernel and the CPU code.

1. maximum, smallest finite value, check for NaN and +inf                    one pass
2. min-p: a threshold below the maximum
3. top-k: search for the k-th largest value                                  about four passes
4. top-p: search for the value at which the mass from the top reaches p      about four passes
5. argmax of logit / temperature + Gumbel noise over the survivors           one pass

Nothing is sorted: `row_search.search` finds thresholds.

The kernel folds a row in lanes. Its first pass also keeps the two best entries of every lane (`Candidates`). If all
survivors are among them, steps 3 to 5 run on the candidates, which stay in registers, and the row is not read again
except for the mass that top-p without top-k needs. With 2048 lanes and evenly spread survivors this fails in about 1
of 200 rows for 50 survivors, 1 of 25 for 100, and 2 of 3 for 300; then the passes run over the whole row.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.row_search import INF, INT32_MAX, FoldStep, LogitsRow, search, take_best, total

type Mode = Literal["greedy", "random", "filtered"]
type LogprobMode = Literal["raw", "processed"]


class SamplingCall(NamedTuple):
    """The static options of one call."""

    mode: Mode
    logprobs: LogprobMode | None
    top_n: int
    given: bool  # the tokens are given, only their log probabilities are wanted


class RowParams(NamedTuple):
    """What rows are sampled by: arrays [rows] in a call of the op, the scalars of one row in this module."""

    temperature: jax.Array  # float32; 0 is greedy
    top_k: jax.Array  # int32; 0 or less is off
    top_p: jax.Array  # float32; 1 is off
    min_p: jax.Array  # float32; 0 is off
    seed: jax.Array  # uint32
    position: jax.Array  # int32

    def filtered(self) -> jax.Array:
        """bool: whether a row is sampled with a filter."""
        return (self.temperature > 0) & ((self.top_k > 0) | (self.top_p < 1) | (self.min_p > 0))


class Survivors(NamedTuple):
    """The entries that pass the filters: those above `value`, and those equal to it from id `first_tie` on."""

    value: jax.Array
    first_tie: jax.Array

    def keep(self, x: jax.Array, ids: jax.Array) -> jax.Array:
        return (x > -INF) & ((x > self.value) | ((x == self.value) & (ids >= self.first_tie)))


class Summary(NamedTuple):
    """What the first pass over a row finds."""

    maximum: jax.Array
    argmax: jax.Array  # the lowest id among equals
    smallest: jax.Array  # of the finite values
    valid: jax.Array  # no NaN, no +inf, at least one finite value


class Candidates(NamedTuple):
    """The two best entries of every lane as a row, and the best value of all other entries."""

    row: LogitsRow
    best_other: jax.Array


def summarize(row: LogitsRow, *, want_candidates: bool = False) -> tuple[Summary, Candidates | None]:
    """The first pass. Only a row that is folded in lanes has candidates."""

    def step(acc: tuple[jax.Array, ...], x: jax.Array, ids: jax.Array) -> tuple[jax.Array, ...]:
        best, best_id, smallest, bad, *more = acc
        better = x > best
        if more:
            second, second_id, other = more
            beats_second = x > second  # also True if x beats the best
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

    lowest, zero = jnp.float32(-INF), jnp.int32(0)
    keeps = (lowest, zero, lowest) if want_candidates and row.in_lanes else ()
    best, best_id, smallest, bad, *more = row.fold(step, lowest, zero, jnp.float32(INF), zero, *keeps)
    maximum, argmax = take_best(best, best_id)
    valid = (jnp.max(bad) == 0) & (maximum > -INF)
    # An invalid row runs through all steps too: give it numbers with which every loop ends.
    summary = Summary(
        jnp.where(valid, maximum, 0.0), jnp.where(valid, argmax, 0), jnp.where(valid, jnp.min(smallest), 0.0), valid
    )
    if not more:
        return summary, None
    second, second_id, other = more

    def fold(step: FoldStep, *initial: jax.Array, enabled: Any = True) -> tuple[jax.Array, ...]:
        del enabled  # a pass over registers costs almost nothing
        acc = tuple(jnp.full(best.shape, value, value.dtype) for value in initial)
        return step(step(acc, best, best_id), second, second_id)

    return summary, Candidates(LogitsRow(row.size, fold, row.at, in_lanes=False), jnp.max(other))


def weight_of(maximum: jax.Array, inverse_temperature: jax.Array) -> Callable[[jax.Array], jax.Array]:
    """A function from a logit to its unnormalized probability, which is 1 for the maximum."""
    return lambda x: jnp.exp((x - maximum) * inverse_temperature)


def filter_row(
    row: LogitsRow,
    params: RowParams,
    summary: Summary,
    *,
    pivots: int,
    enabled: jax.Array | bool = True,
    whole: LogitsRow | None = None,
) -> tuple[Survivors, jax.Array]:
    """Apply min-p, then top-k, then top-p. Greedy rows keep everything. Meaningless, and free, if not `enabled`.

    If `row` holds candidates only, `whole` is the row they come from. The survivors are then right if every entry
    that is not a candidate is below the second value returned.
    """
    sampled = (params.temperature > 0) & enabled
    temperature = jnp.where(sampled, params.temperature, 1.0)
    has_min_p, has_top_k = sampled & (params.min_p > 0), sampled & (params.top_k > 0) & (params.top_k < row.size)
    below = summary.maximum + temperature * jnp.log(jnp.where(has_min_p, params.min_p, 1.0))
    below = jnp.minimum(below, summary.maximum)  # rounding must not drop the maximum
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

    # An entry is kept if the entries before it, from the largest down, have less than p of the mass, so the largest is
    # always kept. Of equal entries the higher id comes first, as in a stable ascending sort read from its end.
    nucleus = sampled & (params.top_p < 1)
    weight = weight_of(summary.maximum, 1.0 / temperature)

    def mass_of(row: LogitsRow, enabled: jax.Array) -> jax.Array:
        return total(row, lambda x, ids: jnp.where(x >= low, weight(x), 0.0), enabled=enabled)[0]

    mass = mass_of(row, nucleus)
    if whole is not None:  # without top-k, other entries than candidates have mass too
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
    # The mass counts what top-k kept; without top-k it counts the whole row, candidates or not.
    return Survivors(value, first_tie), jnp.where(has_top_k, low, value)


def keep_all(summary: Summary) -> Survivors:
    """No filter: every finite entry survives."""
    return Survivors(summary.smallest, jnp.int32(0))


def _mix(h: jax.Array, key: jax.Array | None = None) -> jax.Array:
    """A 32-bit finalizer with low bias; a key is mixed in half-way."""
    h = h ^ (h >> 16)
    h = h * jnp.uint32(0x7FEB352D)
    h = h ^ (h >> 15) if key is None else h ^ (h >> 15) ^ key
    h = h * jnp.uint32(0x846CA68B)
    return h ^ (h >> 16)


def gumbel_noise(seed: jax.Array, position: jax.Array, ids: jax.Array) -> jax.Array:
    """Gumbel noise that depends on (seed, position, id) alone, so that a replayed step draws the same token.

    `seed` and `position` are scalars, or broadcast against `ids`.
    """
    position = lax.convert_element_type(position, jnp.uint32)
    first = _mix(_mix(seed ^ jnp.uint32(0x9E3779B9)) + position * jnp.uint32(0x9E3779B1))
    second = _mix(_mix(seed + jnp.uint32(0x85EBCA6B)) ^ _mix(position + jnp.uint32(0xC2B2AE35)))
    bits = _mix(lax.convert_element_type(ids, jnp.uint32) * jnp.uint32(0x9E3779B1) + first, second)
    # -log(1 - u) is exponential. Small u give large noise, and float32 is finest near 0: so the upper tail reaches
    # 22.9, whereas noise from -log(u) would end at 17 and never draw a token with a probability below 1e-7.
    uniform = bits.astype(jnp.float32) * 2.0**-32 + 2.0**-33
    exponential = -jnp.log1p(-jnp.minimum(uniform, 1.0 - 2.0**-24))
    return -jnp.log(exponential)


def draw(
    row: LogitsRow, params: RowParams, summary: Summary, survivors: Survivors, *, enabled: jax.Array | bool = True
) -> jax.Array:
    """Gumbel-max over the survivors; greedy rows take the maximum. Meaningless if not `enabled`."""
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


def sample_row(row: LogitsRow, params: RowParams, *, mode: str, pivots: int) -> tuple[jax.Array, Summary, Survivors]:
    """Draw one token. `mode` bounds what the row may ask for: "greedy", "random" (no filters) or "filtered"."""
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
    """Log probability of one entry, its rank (1 plus the number of strictly greater entries), and the normalizer."""

    logprob: jax.Array
    rank: jax.Array
    normalizer: Callable[[jax.Array], jax.Array]  # logit -> logprob


def likelihood(
    row: LogitsRow, token: jax.Array, summary: Summary, survivors: Survivors, inverse_temperature: jax.Array
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


def next_best(row: LogitsRow, survivors: Survivors, after: tuple[Any, Any]) -> tuple[jax.Array, jax.Array]:
    """The survivor that follows (value, id) in descending order, equals by ascending id; (-inf, -1) at the end."""
    value, position = after

    def step(acc: tuple[jax.Array, ...], x: jax.Array, ids: jax.Array) -> tuple[jax.Array, ...]:
        best, best_id = acc
        follows = (x < value) | ((x == value) & (ids > position))
        better = survivors.keep(x, ids) & follows & (x > best)
        return jnp.where(better, x, best), jnp.where(better, ids, best_id)

    best, token = take_best(*row.fold(step, jnp.float32(-INF), jnp.int32(INT32_MAX)))
    return best, jnp.where(best > -INF, token, -1)


def one_row(
    call: SamplingCall, row: LogitsRow, raw: LogitsRow | None, params: RowParams | jax.Array, *, pivots: int
) -> tuple[jax.Array, jax.Array, LogitsRow, Survivors, Likelihood | None]:
    """Token, validity, and the row, survivors and likelihood that its log probabilities are computed from."""
    if call.given:
        assert not isinstance(params, RowParams)
        token, (summary, _) = params, summarize(row)
        survivors = keep_all(summary)
    else:
        assert isinstance(params, RowParams)
        token, summary, survivors = sample_row(row, params, mode=call.mode, pivots=pivots)
    if call.logprobs is None:
        return token, summary.valid, row, survivors, None
    inverse = jnp.float32(1)
    if call.logprobs == "processed":
        assert isinstance(params, RowParams)
        inverse = 1.0 / jnp.where(params.temperature > 0, params.temperature, 1.0)
    else:
        source: Summary = summary if raw is None else summarize(raw)[0]
        row, summary, survivors = raw or row, source, keep_all(source)
    return token, summary.valid, row, survivors, likelihood(row, token, summary, survivors, inverse)
