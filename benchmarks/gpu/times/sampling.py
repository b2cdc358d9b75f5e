# SPDX-License-Identifier: Apache-2.0
"""Section `time_sampling`: sampling with each filter.

The floor: the logits read once, although filters need several passes.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu.book import Page
from benchmarks.gpu.times import timing
from benchmarks.gpu.times.attention import of_kind
from benchmarks.gpu.times.timing import Aim, Arrays, Timed
from pallas_kernels.sampling import RowParams, sample
from pallas_kernels.tuning import SamplingTiles, Tiles

FILTERS: dict[str, dict[str, float]] = {
    "greedy": dict(temperature=0.0),
    "random": {},
    "top_k 50": dict(top_k=50),
    "top_p 0.9": dict(top_p=0.9),
    "both": dict(top_k=50, top_p=0.9),
}


def sampling_case(
    rows: int,
    asked: str,
    *,
    vocabulary: int = 128256,
    dtype: str = "float32",
    logprobs: Any = None,
    top_n: int = 0,
    tiles: Tiles | None = None,
) -> Timed:
    """A call's tokens are the next call's positions."""
    mode = asked if asked in ("greedy", "random") else "filtered"
    size = float(rows * vocabulary * jnp.dtype(dtype).itemsize)
    sets = timing.sets_needed(size)
    numbers = dict(temperature=0.8, top_k=0, top_p=1.0, min_p=0.0) | FILTERS[asked]

    def arrays(pools: tuple[jax.Array, ...]) -> Arrays:
        del pools
        fixed: dict[str, Any] = {
            n: np.full(rows, v, np.int32 if n == "top_k" else np.float32) for n, v in numbers.items()
        }
        fixed["seed"] = np.arange(rows, dtype=np.uint32) * np.uint32(7919)
        keys = jax.random.split(jax.random.key(5), sets)
        logits = [(3 * jax.random.normal(k, (rows, vocabulary), jnp.float32)).astype(jnp.dtype(dtype)) for k in keys]
        return Arrays(np.arange(rows, dtype=np.int32), fixed, logits)

    def step(position: jax.Array, fixed: dict[str, jax.Array], logits: jax.Array) -> jax.Array:
        params = RowParams(**fixed, position=position)
        out = sample(logits, params, mode=mode, logprobs=logprobs, top_n=top_n, tiles=of_kind(SamplingTiles, tiles))
        return out.tokens

    return Timed(
        f"{rows} x {vocabulary} {dtype} {asked}" + (f" {logprobs} logprobs top {top_n}" if logprobs else ""),
        (),
        arrays,
        step,
        bytes=size,
        target=sampling_target(rows, mode) if vocabulary == 128256 and dtype == "float32" and not logprobs else None,
        facts=dict(rows=rows, vocabulary=vocabulary, mode=mode, asked=asked, sets=sets),
    )


def sampling_target(rows: int, mode: str) -> Aim | None:
    if rows != 256 or mode == "random":
        return None
    return Aim("us", 100 if mode == "greedy" else 400, at_most=True)


def sampling_cases(tiny: bool) -> list[Timed]:
    if tiny:
        return [sampling_case(2, asked, vocabulary=300) for asked in ("greedy", "both")]
    cases = [sampling_case(rows, asked) for asked in FILTERS for rows in (1, 8, 64, 256)]
    cases += [sampling_case(256, asked, dtype="bfloat16") for asked in ("greedy", "both")]
    cases += [sampling_case(64, "both", logprobs="raw", top_n=n) for n in (0, 5)]
    return [*cases, sampling_case(256, "both", vocabulary=151936)]


def run(page: Page) -> None:
    timing.run(page, sampling_cases(page.settings.tiny))
