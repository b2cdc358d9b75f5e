# SPDX-License-Identifier: Apache-2.0
"""Sample one token per row of logits, and say how likely it was.

    token[r] = argmax_i over the survivors of  logits[r, i] / temperature[r] + gumbel(seed[r], position[r], i)

    logits      [rows, vocabulary]   float32 | bfloat16 | float16; -inf excludes an entry
    parameters  `SamplingParams`, one number per row each

Filters in this order, each on what the one before left: min-p drops entries below max + log(min_p) (after the
temperature), top-k keeps the k largest with all ties at the k-th, top-p keeps the smallest set from the top whose
mass reaches p (at least one entry; among equals at the boundary higher ids first). Temperature 0 takes the maximum,
the lowest id among equals, and ignores the filters.

A row's result depends on its own logits and parameters and on nothing else: not on the batch, the row's place, or
time. The noise is a hash of (seed, position, id): no key arrays, and a replayed step draws the same token.

`valid` is False for a row with a NaN, a +inf or no finite entry; its token is 0 and means nothing.

Log-probabilities: "raw" is log_softmax of `raw_logits` (the logits before penalties and masks; `logits` if not
given), "processed" that of the survivors after the temperature. `ranks` counts strictly larger entries, plus one.
The top N come best first, equals by ascending id; where fewer exist, token -1 and -inf.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels import checks, dispatch, row_sampler, tuning
from pallas_kernels.flash import next_power_of_two
from pallas_kernels.row_sampler import Params, Row, Summary, Survivors
from pallas_kernels.tuning import SamplingTiles

type Mode = Literal["greedy", "random", "filtered"]
type LogprobMode = Literal["raw", "processed"]

_TWIN_PIVOTS = 4  # on a CPU each pivot is a pass of its own
MAX_VOCABULARY = 2**24  # counts are exact in float32 up to here


class SamplingParams(NamedTuple):
    """Per-row parameters, each [rows]. Off: top_k 0, top_p 1, min_p 0. Greedy: temperature 0."""

    temperature: jax.Array  # float32
    top_k: jax.Array  # int32
    top_p: jax.Array  # float32
    min_p: jax.Array  # float32
    seed: jax.Array  # uint32
    position: jax.Array  # int32


class Logprobs(NamedTuple):
    logprobs: jax.Array  # float32 [rows], of the token
    ranks: jax.Array  # int32 [rows]
    top_tokens: jax.Array  # int32 [rows, top_n]
    top_logprobs: jax.Array  # float32 [rows, top_n]


class Sampled(NamedTuple):
    tokens: jax.Array  # int32 [rows]
    valid: jax.Array  # bool [rows]
    logprobs: Logprobs | None


def sample(
    logits: jax.Array,
    params: SamplingParams,
    *,
    mode: Mode = "filtered",
    logprobs: LogprobMode | None = None,
    top_n: int = 0,
    raw_logits: jax.Array | None = None,
    tiles: SamplingTiles | None = None,
) -> Sampled:
    """`mode` is the caller's promise of what any row asks for: "greedy" (every temperature is 0), "random" (no row
    filters) or "filtered" (anything); the smaller modes make fewer passes over the logits.
    """
    logits, params = jnp.asarray(logits), SamplingParams(*(jnp.asarray(p) for p in params))
    _check(logits, top_n)
    checks.require(mode in ("greedy", "random", "filtered"), f"mode is {mode!r}, expected greedy, random or filtered")
    checks.require(logprobs in (None, "raw", "processed"), f"logprobs is {logprobs!r}, expected None, raw or processed")
    checks.require(top_n == 0 or logprobs is not None, f"top_n is {top_n} but logprobs is None")
    for (name, array), dtype in zip(params._asdict().items(), _PARAM_DTYPES, strict=True):
        checks.check_shape(name, array, (logits.shape[0],), f"logits have {logits.shape[0]} rows")
        checks.require(array.dtype == dtype, f"{name} must be {jnp.dtype(dtype).name}, got {array.dtype}")
    if checks.is_concrete(*params):
        check_params({name: np.asarray(p) for name, p in params._asdict().items()}, mode=mode)
    if raw_logits is not None:
        checks.require(logprobs == "raw", f"raw_logits are given but logprobs is {logprobs!r}")
        checks.check_float("raw_logits", raw_logits)
        checks.check_shape("raw_logits", raw_logits, tuple(logits.shape), "the shape of logits")
    plan = _Plan(mode=mode, logprobs=logprobs, top_n=top_n, given=False)
    return _run(plan, logits, raw_logits, params, tiles)


def token_logprobs(
    logits: jax.Array, tokens: jax.Array, *, top_n: int = 0, tiles: SamplingTiles | None = None
) -> Logprobs:
    """Raw log-probabilities of given tokens int32 [rows], for scoring and prompt logprobs."""
    logits, tokens = jnp.asarray(logits), jnp.asarray(tokens)
    _check(logits, top_n)
    checks.check_int32("tokens", tokens)
    checks.check_shape("tokens", tokens, (logits.shape[0],), f"logits have {logits.shape[0]} rows")
    if checks.is_concrete(tokens):
        outside = [int(t) for t in np.asarray(tokens) if not 0 <= t < logits.shape[1]]
        checks.require(not outside, f"tokens hold {outside[:1]}, the vocabulary has {logits.shape[1]} entries")
    plan = _Plan(mode="greedy", logprobs="raw", top_n=top_n, given=True)
    result = _run(plan, logits, None, tokens, tiles).logprobs
    assert result is not None  # the plan asks for them
    return result


_PARAM_DTYPES = (jnp.float32, jnp.int32, jnp.float32, jnp.float32, jnp.uint32, jnp.int32)


def _check(logits: jax.Array, top_n: int) -> None:
    checks.check_rank("logits", logits, "rows vocabulary")
    checks.check_float("logits", logits)
    rows, vocabulary = logits.shape
    checks.require(rows > 0, f"logits have {rows} rows, expected at least 1")
    checks.require(
        0 < vocabulary <= MAX_VOCABULARY, f"the vocabulary has {vocabulary} entries, expected 1 to {MAX_VOCABULARY}"
    )
    checks.require(0 <= top_n <= vocabulary, f"top_n is {top_n}, the vocabulary has {vocabulary} entries")


def check_params(params: Mapping[str, np.ndarray], *, mode: Mode) -> None:
    """Check the numbers on the host (numpy arrays, named as in `SamplingParams`): ranges, and the promise of `mode`."""
    ranges = {
        "temperature": (0.0, np.finfo(np.float32).max, "0 or more, finite"),
        "top_p": (np.nextafter(np.float32(0), np.float32(1)), 1.0, "above 0, up to 1"),
        "min_p": (0.0, 1.0, "0 to 1"),
    }
    for name, (low, high, words) in ranges.items():
        values = params[name]
        bad = np.flatnonzero(~((values >= low) & (values <= high)))
        checks.require(bad.size == 0, f"{name}[{bad[:1]}] is {values[bad[:1]]}, expected {words}")
    sampled = params["temperature"] > 0
    checks.require(mode != "greedy" or not sampled.any(), "mode is 'greedy' but a row has a temperature above 0")
    filtered = sampled & ((params["top_k"] > 0) | (params["top_p"] < 1) | (params["min_p"] > 0))
    checks.require(
        mode == "filtered" or not filtered.any(), f"mode is {mode!r} but a row asks for top_k, top_p or min_p"
    )


class _Plan(NamedTuple):
    """What is static about one call. `given`: the tokens come from outside."""

    mode: Mode
    logprobs: LogprobMode | None
    top_n: int
    given: bool


def _run(
    plan: _Plan,
    logits: jax.Array,
    raw_logits: jax.Array | None,
    params: SamplingParams | jax.Array,
    tiles: SamplingTiles | None,
) -> Sampled:
    if dispatch.implementation() == "reference":
        return reference(plan, logits, raw_logits, params)
    return _kernel_call(plan, logits, raw_logits, params, tiles)


def _one_row(
    plan: _Plan, row: Row, raw: Row | None, params: Params | jax.Array, *, pivots: int
) -> tuple[jax.Array, jax.Array, Row, Survivors, row_sampler.Likelihood | None]:
    """Token, validity, and the row, survivors and likelihood that its log-probabilities come from."""
    if plan.given:
        assert not isinstance(params, Params)
        token, (summary, _) = params, row_sampler.summarize(row)
        survivors = row_sampler.keep_all(summary)
    else:
        assert isinstance(params, Params)
        token, summary, survivors = row_sampler.sample_row(row, params, mode=plan.mode, pivots=pivots)
    if plan.logprobs is None:
        return token, summary.valid, row, survivors, None
    inverse = jnp.float32(1)
    if plan.logprobs == "processed":
        assert isinstance(params, Params)
        inverse = 1.0 / jnp.where(params.temperature > 0, params.temperature, 1.0)
    else:
        source: Summary = summary if raw is None else row_sampler.summarize(raw)[0]
        row, summary, survivors = raw or row, source, row_sampler.keep_all(source)
    return token, summary.valid, row, survivors, row_sampler.likelihood(row, token, summary, survivors, inverse)


# --- reference twin ---------------------------------------------------------------------------------------------


def reference(
    plan: _Plan, logits: jax.Array, raw_logits: jax.Array | None, params: SamplingParams | jax.Array
) -> Sampled:
    """The same in plain jax.numpy; what the CPU runs."""
    ids = jnp.arange(logits.shape[1], dtype=jnp.int32)

    def as_row(x: jax.Array) -> Row:
        def fold(step: row_sampler.Step, *initial: jax.Array, enabled: Any = True) -> tuple[jax.Array, ...]:
            del enabled  # rows run side by side here: there is no skipping one
            return step(tuple(jnp.full(x.shape, value, value.dtype) for value in initial), x, ids)

        return Row(x.shape[0], fold, lambda token: x[token], in_lanes=False)

    def one(x: jax.Array, raw: jax.Array | None, p: tuple[jax.Array, ...] | jax.Array) -> Sampled:
        raw_row = None if raw is None else as_row(raw.astype(jnp.float32))
        row_params = Params(*p) if isinstance(p, tuple) else p
        token, valid, row, survivors, likely = _one_row(
            plan, as_row(x.astype(jnp.float32)), raw_row, row_params, pivots=_TWIN_PIVOTS
        )
        if likely is None:
            return Sampled(token, valid, None)
        values = row.fold(lambda acc, x, ids: (jnp.where(survivors.keep(x, ids), x, -jnp.inf),), jnp.float32(0))[0]
        best, top = lax.top_k(values, plan.top_n)
        exists = best > -jnp.inf
        return Sampled(
            token,
            valid,
            Logprobs(
                likely.logprob,
                likely.rank,
                jnp.where(exists, top.astype(jnp.int32), -1),
                jnp.where(exists, likely.normalizer(best), -jnp.inf),
            ),
        )

    return jax.vmap(one)(logits, raw_logits, params)


# --- kernel -----------------------------------------------------------------------------------------------------


def tile_key(logits: jax.Array, mode: Mode) -> str:
    rows, vocabulary = (next_power_of_two(n) for n in logits.shape)
    return tuning.key(dtype=logits.dtype.name, mode=mode, rows=rows, vocabulary=vocabulary)


def tiles_for(logits: jax.Array, mode: Mode) -> SamplingTiles:
    """The measured tiles, with chunks no wider than the row needs."""
    tiles = tuning.choose("sampling", tile_key(logits, mode), SamplingTiles())
    return replace(tiles, block=min(tiles.block, next_power_of_two(max(logits.shape[1], 128))))


def _memory_row(ref: Any, row: jax.Array, block: int) -> Row:
    """A row of logits that stays in device memory and is read `block` entries at a time."""
    size = ref.shape[1]

    def fold(step: row_sampler.Step, *initial: jax.Array, enabled: Any = True) -> tuple[jax.Array, ...]:
        def chunk(i: jax.Array, acc: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            ids = i * block + jnp.arange(block, dtype=jnp.int32)
            x = plt.load(ref.at[row, ids], mask=ids < size, other=jnp.full((), -jnp.inf, ref.dtype))
            return step(acc, x.astype(jnp.float32), ids)

        accumulators = tuple(jnp.full((block,), value, value.dtype) for value in initial)
        chunks = jnp.where(enabled, jnp.int32(pl.cdiv(size, block)), 0)
        return lax.fori_loop(0, chunks, chunk, accumulators)

    return Row(size, fold, lambda token: ref[row, token].astype(jnp.float32), in_lanes=True)


def _kernel(refs: dict[str, Any], *out_refs: Any, plan: _Plan, tiles: SamplingTiles) -> None:
    r = pl.program_id(0)
    raw = _memory_row(refs["raw_logits"], r, tiles.block) if "raw_logits" in refs else None
    params = refs["tokens"][r] if plan.given else Params(*(refs[name][r] for name in Params._fields))
    token, valid, row, survivors, likely = _one_row(
        plan, _memory_row(refs["logits"], r, tiles.block), raw, params, pivots=tiles.pivots
    )
    tokens_ref, valid_ref, *logprob_refs = out_refs
    tokens_ref[r] = token
    valid_ref[r] = valid.astype(jnp.int32)
    if likely is None:
        return
    logprobs_ref, ranks_ref, *top_refs = logprob_refs
    logprobs_ref[r] = likely.logprob
    ranks_ref[r] = likely.rank

    def one(i: jax.Array, after: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        best, top = row_sampler.next_best(row, survivors, after)
        top_refs[0][r, i] = top
        top_refs[1][r, i] = jnp.where(best > -jnp.inf, likely.normalizer(best), -jnp.inf)
        return best, top

    if plan.top_n:
        lax.fori_loop(0, plan.top_n, one, (jnp.float32(jnp.inf), jnp.int32(-1)))


def _kernel_call(
    plan: _Plan,
    logits: jax.Array,
    raw_logits: jax.Array | None,
    params: SamplingParams | jax.Array,
    tiles: SamplingTiles | None,
) -> Sampled:
    rows = logits.shape[0]
    tiles = tiles or tiles_for(logits, plan.mode)
    named = params._asdict() if isinstance(params, SamplingParams) else {"tokens": params}
    optional = {} if raw_logits is None else {"raw_logits": raw_logits}
    outputs = [jax.ShapeDtypeStruct((rows,), jnp.int32), jax.ShapeDtypeStruct((rows,), jnp.int32)]
    if plan.logprobs is not None:
        outputs += [jax.ShapeDtypeStruct((rows,), jnp.float32), jax.ShapeDtypeStruct((rows,), jnp.int32)]
    if plan.top_n:
        shape = (rows, plan.top_n)
        outputs += [jax.ShapeDtypeStruct(shape, jnp.int32), jax.ShapeDtypeStruct(shape, jnp.float32)]

    def kernel(refs: dict[str, Any], *out_refs: Any) -> None:
        _kernel(refs, *out_refs, plan=plan, tiles=tiles)

    tokens, valid, *rest = dispatch.kernel_call(
        kernel,
        grid=(rows,),
        inputs={"logits": logits, **named, **optional},
        outputs=outputs,
        num_warps=tiles.num_warps,
        num_stages=2,
        name="token_logprobs" if plan.given else f"sample_{plan.mode}",
    )
    if plan.logprobs is None:
        return Sampled(tokens, valid != 0, None)
    empty = (jnp.zeros((rows, 0), jnp.int32), jnp.zeros((rows, 0), jnp.float32))
    return Sampled(tokens, valid != 0, Logprobs(*rest, *(() if plan.top_n else empty)))
