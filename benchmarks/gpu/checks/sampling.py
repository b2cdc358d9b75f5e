# SPDX-License-Identifier: Apache-2.0
"""Section `check_sampling`: tokens, validity and log probabilities against the oracle, and tokens against the CPU."""

import hashlib
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu.book import Page, Row
from benchmarks.gpu.checks import poison
from benchmarks.gpu.checks.attention import implementation
from pallas_kernels import dispatch, reference
from pallas_kernels.reference import Array, survivors, wide
from pallas_kernels.sampling import LogprobMode, Mode, RowParams, Sampled, sample

COLUMNS = ("rows", "wrong", "near_ties", "cpu_differs", "logprob_err", "written", "ok")


MODES: tuple[Mode, ...] = ("greedy", "random", "filtered")
_FILTERS = ("temperature", "top_k", "top_p", "min_p")  # the first of RowParams


@dataclass(frozen=True)
class SamplingCase:
    name: str
    mode: Mode
    rows: int = 24
    vocabulary: int = 128256
    dtype: str = "float32"
    logprobs: LogprobMode | None = None
    top_n: int = 0
    spread: float = 3.0  # standard deviation of the logits


def draw_params(rng: np.random.Generator, case: SamplingCase) -> RowParams:
    """Different parameters for every row: some greedy, some with one filter, some with several."""
    n = case.rows
    filtered = case.mode == "filtered"
    temperature = np.zeros(n) if case.mode == "greedy" else rng.uniform(0.2, 2.0, n)
    top_k = np.where(rng.random(n) < 0.5, rng.choice([1, 2, 50, 1000, case.vocabulary - 1, 2 * case.vocabulary], n), 0)
    top_p = np.where(rng.random(n) < 0.5, rng.uniform(0.05, 0.999, n), 1.0)
    min_p = np.where(rng.random(n) < 0.3, rng.uniform(0.001, 0.3, n), 0.0)
    if filtered:
        temperature[rng.random(n) < 0.15] = 0
    numbers: list[Any] = [
        temperature.astype(np.float32),
        (top_k if filtered else np.zeros(n)).astype(np.int32),
        (top_p if filtered else np.ones(n)).astype(np.float32),
        (min_p if filtered else np.zeros(n)).astype(np.float32),
        rng.integers(0, 2**32, n, np.uint32),
        rng.integers(0, 100_000, n).astype(np.int32),
    ]
    return RowParams(*numbers)


def draw_logits(rng: np.random.Generator, case: SamplingCase) -> Array:
    """Random rows with a few edge cases: NaN, no finite entry, all equal, most entries excluded, one left, infinity."""
    x = (case.spread * rng.standard_normal((case.rows, case.vocabulary), np.float32)).astype(jnp.dtype(case.dtype))
    awkward = rng.permutation(case.rows)
    x[awkward[0], case.vocabulary // 2] = np.nan
    if case.rows > 7:
        x[awkward[1]] = -np.inf
        x[awkward[2]] = 1.5
        x[awkward[3], rng.random(case.vocabulary) < 0.9] = -np.inf
        x[awkward[4]] = -np.inf
        x[awkward[4], case.vocabulary - 1] = -4.0
        x[awkward[5], :3] = np.inf
    return x


def on_cpu(case: SamplingCase, logits: Array, params: RowParams) -> Array:
    """The tokens that the CPU draws."""

    def draw(logits: jax.Array, params: RowParams) -> jax.Array:
        return sample(logits, params, mode=case.mode).tokens

    with jax.default_device(jax.devices("cpu")[0]), dispatch.use("cpu"):
        return np.asarray(jax.jit(draw)(logits, params))


class Verdict(NamedTuple):
    """What `judge` found."""

    token: int  # what the oracle draws
    exact: bool  # the given token is that token
    accepted: bool  # or rounding explains the difference
    survivors: Array  # bool, what the filters keep


def judge(x: Array, token: int, *, seed: int, position: int, **filters: Any) -> Verdict:
    """Whether the oracle draws `token` from this row, or its score is within 1e-4 of the best and 2e-5 of a limit."""
    temperature = filters["temperature"]
    exact = survivors(x, **filters)
    best = reference.sample(x, **filters, seed=seed, position=position)
    if token == best or temperature == 0:
        return Verdict(best, token == best, token == best, exact)
    scores = (x - x.max()) / temperature + reference.gumbel(seed, position, x.size)
    loose, tight = (survivors(x, **filters, slack=slack) for slack in (2e-5, -2e-5))
    accepted = bool(loose[token]) and scores[token] >= scores[tight].max(initial=-np.inf) - 1e-4
    return Verdict(best, False, accepted, exact)


def digest(tokens: Array) -> str:
    return hashlib.sha256(np.ascontiguousarray(tokens, np.int32)).hexdigest()[:16]


def check_logprobs(x: Array, keep: Array, temperature: float, *, r: int, out: Sampled) -> float:
    """The largest error of the row's log probabilities; infinite if a rank or a top token is wrong."""
    assert out.logprobs is not None
    token, top_n = int(out.tokens[r]), out.logprobs.top_tokens.shape[1]
    live = np.where(keep, x, -np.inf)
    exact = reference.logprobs(x, keep, temperature=temperature)
    if int(out.logprobs.ranks[r]) != int((live > x[token]).sum()) + 1:
        return np.inf
    order = np.lexsort((np.arange(x.size), -live))[:top_n]
    exists = live[order] > -np.inf
    if not (out.logprobs.top_tokens[r] == np.where(exists, order, -1)).all():
        return np.inf
    expected = np.append(exact[order][exists], exact[token])
    found = np.append(out.logprobs.top_logprobs[r][exists], out.logprobs.logprobs[r]).astype(np.float64)
    return float(np.abs(found - expected).max())


def check(rng: np.random.Generator, case: SamplingCase) -> Row:
    logits, params = draw_logits(rng, case), draw_params(rng, case)

    def draw(given: tuple[jax.Array, RowParams]) -> Sampled:
        return sample(*given, mode=case.mode, logprobs=case.logprobs, top_n=case.top_n)

    outcome = poison.run(draw, jax.tree.map(jnp.asarray, (logits, params)))
    out, other = outcome.first, on_cpu(case, logits, params)
    wrong, near, cpu_wrong, logprob_error = [], 0, 0, 0.0
    for r, row in enumerate(wide(logits)):
        is_valid = not (np.isnan(row).any() or (row == np.inf).any() or (row == -np.inf).all())
        token = int(out.tokens[r])
        if bool(out.valid[r]) != is_valid or (not is_valid and token != 0):
            wrong.append(r)
        if not is_valid:
            continue
        asked = {name: values[r].item() for name, values in zip(_FILTERS, params, strict=False)}
        noise = dict(seed=int(params.seed[r]), position=int(params.position[r]))
        verdict = judge(row, token, **noise, **asked)
        if not verdict.accepted:
            wrong.append(r)
            continue
        near += not verdict.exact
        cpu_wrong += not judge(row, int(other[r]), **noise, **asked).accepted
        if case.logprobs is not None:
            processed = case.logprobs == "processed"
            keep = verdict.survivors if processed else row > -np.inf
            temperature = asked["temperature"] if processed else 1.0
            logprob_error = max(logprob_error, check_logprobs(row, keep, temperature, r=r, out=out))
    return {
        "rows": case.rows,
        "wrong": len(wrong),
        "wrong_rows": wrong,
        "near_ties": near,  # rows where float64 draws another token; the scores differ by less than 1e-4
        "cpu_differs": int((out.tokens != other).sum()),
        "cpu_wrong": cpu_wrong,
        "tokens_hash": digest(out.tokens),
        "cpu_hash": digest(other),
        "logprob_err": logprob_error,
        "written": outcome.repeatable,
        "aliased": outcome.aliased,
        "ok": not wrong and cpu_wrong == 0 and outcome.repeatable and logprob_error <= 2e-4,
    }


def cases(tiny: bool) -> list[SamplingCase]:
    if tiny:
        size: dict[str, Any] = dict(rows=9, vocabulary=257)
        return [
            SamplingCase("greedy", "greedy", **size),
            SamplingCase("filtered bfloat16 raw top 3", "filtered", dtype="bfloat16", logprobs="raw", top_n=3, **size),
        ]
    found = [SamplingCase(f"{mode} {dtype}", mode, dtype=dtype) for mode in MODES for dtype in ("float32", "bfloat16")]
    return [
        *found,
        SamplingCase("filtered float16", "filtered", dtype="float16"),
        SamplingCase("filtered raw top 5", "filtered", logprobs="raw", top_n=5),
        SamplingCase("filtered processed top 20", "filtered", logprobs="processed", top_n=20),
        SamplingCase("greedy raw top 1", "greedy", logprobs="raw", top_n=1),
        SamplingCase("filtered peaked", "filtered", spread=12.0),
        SamplingCase("filtered flat", "filtered", spread=0.01),
        SamplingCase("filtered 151936", "filtered", vocabulary=151936),
        SamplingCase("filtered 262144", "filtered", vocabulary=262144, rows=12),
        SamplingCase("filtered 1000", "filtered", vocabulary=1000, rows=200),
        SamplingCase("random 33", "random", vocabulary=33, rows=300),
    ]


def run(page: Page) -> None:
    with implementation(page):
        page.each(cases(page.settings.tiny), lambda case: check(page.rng, case), name=lambda case: case.name)
