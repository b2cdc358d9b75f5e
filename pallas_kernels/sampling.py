# SPDX-License-Identifier: Apache-2.0
"""Sample one token per row of logits, and compute its log probability.

    token[r] = argmax_i over the survivors of  logits[r, i] / temperature[r] + gumbel(seed[r], position[r], i)

    logits      [rows, vocabulary]   float32 | bfloat16 | float16; -inf excludes an entry
    parameters  `RowParams`, one number per row each

The filters run in this order, each on the entries that the previous one kept. min-p drops entries below max +
log(min_p), after the temperature. top-k keeps the k largest, with all ties at the k-th. top-p keeps the smallest set
of largest entries whose mass reaches p, at least one entry; of equal entries at the boundary it keeps higher ids.
Temperature 0 takes the maximum, the lowest id among equals, and ignores the filters.

A row's result depends on its own logits and parameters only, not on the batch, its place in it, or time. The noise
is a hash of (seed, position, id), so there are no key arrays and a replayed step draws the same token.

`valid` is False for a row with a NaN, a +inf or no finite entry; its token is 0 and has no meaning.

Log probabilities: "raw" is log_softmax of `raw_logits` (the logits before penalties and masks; by default `logits`),
"processed" is that of the survivors after the temperature. `ranks` is one plus the number of strictly larger entries.
The top N are in descending order, equals by ascending id; missing entries have token -1 and -inf.
"""

from dataclasses import replace
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels import checks, dispatch, row_sampler, tuning
from pallas_kernels.flash import next_power_of_two
from pallas_kernels.on_cpu import sampling as on_cpu
from pallas_kernels.row_sampler import LogprobMode, Mode, RowParams, SamplingCall
from pallas_kernels.row_search import FoldStep, LogitsRow
from pallas_kernels.tuning import SamplingTiles

MAX_VOCABULARY = 2**24  # counts are exact in float32 up to here


class Logprobs(NamedTuple):
    """Log probabilities of one token per row, and the most likely tokens."""

    logprobs: jax.Array  # float32 [rows], of the token
    ranks: jax.Array  # int32 [rows]
    top_tokens: jax.Array  # int32 [rows, top_n]
    top_logprobs: jax.Array  # float32 [rows, top_n]


class Sampled(NamedTuple):
    """What `sample` returns."""

    tokens: jax.Array  # int32 [rows]
    valid: jax.Array  # bool [rows]
    logprobs: Logprobs | None


def sample(
    logits: jax.Array,
    params: RowParams,
    *,
    mode: Mode = "filtered",
    logprobs: LogprobMode | None = None,
    top_n: int = 0,
    raw_logits: jax.Array | None = None,
    tiles: SamplingTiles | None = None,
) -> Sampled:
    """`mode` promises what the rows ask for at most: "greedy" (every temperature is 0), "random" (no filters) or
    "filtered" (anything). "greedy" and "random" make fewer passes over the logits.
    """
    logits, params = jnp.asarray(logits), RowParams(*(jnp.asarray(p) for p in params))
    _check(logits, top_n)
    checks.require(mode in ("greedy", "random", "filtered"), f"mode is {mode!r}, expected greedy, random or filtered")
    checks.require(logprobs in (None, "raw", "processed"), f"logprobs is {logprobs!r}, expected None, raw or processed")
    checks.require(top_n == 0 or logprobs is not None, f"top_n is {top_n} but logprobs is None")
    for (name, array), dtype in zip(params._asdict().items(), _PARAM_DTYPES, strict=True):
        checks.check_shape(name, array, (logits.shape[0],), f"logits have {logits.shape[0]} rows")
        checks.require(array.dtype == dtype, f"{name} must be {jnp.dtype(dtype).name}, got {array.dtype}")
    if checks.is_concrete(*params):
        _check_values(RowParams(*cast(Any, map(np.asarray, params))), mode)
    if raw_logits is not None:
        checks.require(logprobs == "raw", f"raw_logits are given but logprobs is {logprobs!r}")
        checks.check_float("raw_logits", raw_logits)
        checks.check_shape("raw_logits", raw_logits, tuple(logits.shape), "the shape of logits")
    call = SamplingCall(mode=mode, logprobs=logprobs, top_n=top_n, given=False)
    return _run(call, logits, raw_logits, params, tiles)


def token_logprobs(
    logits: jax.Array, tokens: jax.Array, *, top_n: int = 0, tiles: SamplingTiles | None = None
) -> Logprobs:
    """Raw log probabilities of the given tokens int32 [rows], for scoring and prompt log probabilities."""
    logits, tokens = jnp.asarray(logits), jnp.asarray(tokens)
    _check(logits, top_n)
    checks.check_int32("tokens", tokens)
    checks.check_shape("tokens", tokens, (logits.shape[0],), f"logits have {logits.shape[0]} rows")
    if checks.is_concrete(tokens):
        outside = [int(t) for t in np.asarray(tokens) if not 0 <= t < logits.shape[1]]
        checks.require(not outside, f"tokens hold {outside[:1]}, the vocabulary has {logits.shape[1]} entries")
    call = SamplingCall(mode="greedy", logprobs="raw", top_n=top_n, given=True)
    result = _run(call, logits, None, tokens, tiles).logprobs
    assert result is not None
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


def _check_values(params: RowParams, mode: Mode) -> None:
    """Check the ranges of parameters that are numpy arrays, and the promise of `mode`."""
    ranges = {
        "temperature": (0.0, np.finfo(np.float32).max, "0 or more, finite"),
        "top_p": (np.nextafter(np.float32(0), np.float32(1)), 1.0, "above 0, up to 1"),
        "min_p": (0.0, 1.0, "0 to 1"),
    }
    for name, (low, high, words) in ranges.items():
        values: np.ndarray = getattr(params, name)
        bad = np.flatnonzero(~((values >= low) & (values <= high)))
        checks.require(bad.size == 0, f"{name}[{bad[:1]}] is {values[bad[:1]]}, expected {words}")
    sampled, filtered = (params.temperature > 0).any(), params.filtered().any()
    checks.require(mode != "greedy" or not sampled, "mode is 'greedy' but a row has a temperature above 0")
    checks.require(mode == "filtered" or not filtered, f"mode is {mode!r} but a row asks for top_k, top_p or min_p")


def _run(
    call: SamplingCall,
    logits: jax.Array,
    raw_logits: jax.Array | None,
    params: RowParams | jax.Array,
    tiles: SamplingTiles | None,
) -> Sampled:
    if dispatch.implementation() == "cpu":
        tokens, valid, likely = on_cpu.sample(call, logits, raw_logits, params)
        return Sampled(tokens, valid, None if likely is None else Logprobs(*likely))
    return _kernel_call(call, logits, raw_logits, params, tiles)


# --- kernel -----------------------------------------------------------------------------------------------------


def tile_key(logits: jax.Array, mode: Mode) -> str:
    rows, vocabulary = (next_power_of_two(n) for n in logits.shape)
    return tuning.key(dtype=logits.dtype.name, mode=mode, rows=rows, vocabulary=vocabulary)


def tiles_for(logits: jax.Array, mode: Mode) -> SamplingTiles:
    """The measured tiles, with chunks no wider than a row."""
    tiles = tuning.choose("sampling", tile_key(logits, mode), SamplingTiles())
    return replace(tiles, block=min(tiles.block, next_power_of_two(max(logits.shape[1], 128))))


def _memory_row(ref: Any, row: jax.Array, block: int) -> LogitsRow:
    """A row of logits in device memory, read `block` entries at a time."""
    size = ref.shape[1]

    def fold(step: FoldStep, *initial: jax.Array, enabled: Any = True) -> tuple[jax.Array, ...]:
        def chunk(i: jax.Array, acc: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            ids = i * block + jnp.arange(block, dtype=jnp.int32)
            x = plt.load(ref.at[row, ids], mask=ids < size, other=jnp.full((), -jnp.inf, ref.dtype))
            return step(acc, x.astype(jnp.float32), ids)

        accumulators = tuple(jnp.full((block,), value, value.dtype) for value in initial)
        chunks = jnp.where(enabled, jnp.int32(pl.cdiv(size, block)), 0)
        return lax.fori_loop(0, chunks, chunk, accumulators)

    return LogitsRow(size, fold, lambda token: ref[row, token].astype(jnp.float32), in_lanes=True)


def _kernel(refs: dict[str, Any], *out_refs: Any, call: SamplingCall, tiles: SamplingTiles) -> None:
    r = pl.program_id(0)
    raw = _memory_row(refs["raw_logits"], r, tiles.block) if "raw_logits" in refs else None
    params = refs["tokens"][r] if call.given else RowParams(*(refs[name][r] for name in RowParams._fields))
    token, valid, row, survivors, likely = row_sampler.one_row(
        call, _memory_row(refs["logits"], r, tiles.block), raw, params, pivots=tiles.pivots
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

    if call.top_n:
        lax.fori_loop(0, call.top_n, one, (jnp.float32(jnp.inf), jnp.int32(-1)))


def _kernel_call(
    call: SamplingCall,
    logits: jax.Array,
    raw_logits: jax.Array | None,
    params: RowParams | jax.Array,
    tiles: SamplingTiles | None,
) -> Sampled:
    rows = logits.shape[0]
    tiles = tiles or tiles_for(logits, call.mode)
    named = params._asdict() if isinstance(params, RowParams) else {"tokens": params}
    optional = {} if raw_logits is None else {"raw_logits": raw_logits}
    outputs = [jax.ShapeDtypeStruct((rows,), jnp.int32), jax.ShapeDtypeStruct((rows,), jnp.int32)]
    if call.logprobs is not None:
        outputs += [jax.ShapeDtypeStruct((rows,), jnp.float32), jax.ShapeDtypeStruct((rows,), jnp.int32)]
    if call.top_n:
        shape = (rows, call.top_n)
        outputs += [jax.ShapeDtypeStruct(shape, jnp.int32), jax.ShapeDtypeStruct(shape, jnp.float32)]

    def kernel(refs: dict[str, Any], *out_refs: Any) -> None:
        _kernel(refs, *out_refs, call=call, tiles=tiles)

    tokens, valid, *rest = dispatch.kernel_call(
        kernel,
        grid=(rows,),
        inputs={"logits": logits, **named, **optional},
        outputs=outputs,
        num_warps=tiles.num_warps,
        num_stages=2,
        name="token_logprobs" if call.given else f"sample_{call.mode}",
    )
    if call.logprobs is None:
        return Sampled(tokens, valid != 0, None)
    empty = (jnp.zeros((rows, 0), jnp.int32), jnp.zeros((rows, 0), jnp.float32))
    return Sampled(tokens, valid != 0, Logprobs(*rest, *(() if call.top_n else empty)))
