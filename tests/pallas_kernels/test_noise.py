# SPDX-License-Identifier: Apache-2.0
"""The noise is good enough to sample with: frequencies, independence, tails. Seeds are fixed; a p-value below 1e-4
under a right hash would be a one in ten thousand event, and here it would be a fixed one."""

import itertools
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.row_sampler import gumbel_noise
from pallas_kernels.sampling import RowParams, sample

DRAWS = 40_000
LOGITS = np.asarray([2.0, 1.5, 1.0, 0.5, 0.0, -0.5, -1.0, -2.0, -3.0, -4.0], np.float32)


@cache
def draw(what: str, temperature: float) -> np.ndarray:
    """Tokens for seeds and positions, one of the two counting up: how they come in practice."""
    count, fixed = np.arange(DRAWS), np.full(DRAWS, 12345)
    seeds, positions = (count, fixed) if what == "seeds" else (fixed, count)
    rows = DRAWS
    p = RowParams(
        jnp.full((rows,), temperature, jnp.float32),
        jnp.zeros((rows,), jnp.int32),
        jnp.ones((rows,), jnp.float32),
        jnp.zeros((rows,), jnp.float32),
        jnp.asarray(seeds, jnp.uint32),
        jnp.asarray(positions, jnp.int32),
    )
    logits = jnp.broadcast_to(jnp.asarray(LOGITS), (rows, LOGITS.size))
    return np.asarray(sample(logits, p, mode="random").tokens)


def probabilities(temperature: float) -> np.ndarray:
    weights = np.exp(LOGITS.astype(np.float64) / temperature)
    return weights / weights.sum()


@pytest.fixture(scope="module")
def stats() -> Any:
    """Imported late: that takes a second, of every process that collects tests."""
    from scipy import stats

    return stats


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.8])
@pytest.mark.parametrize("what", ["seeds", "positions"])
def test_frequencies_are_those_of_softmax(stats: Any, temperature: float, what: str) -> None:
    counts = np.bincount(draw(what, temperature), minlength=LOGITS.size)
    expected = probabilities(temperature) * DRAWS
    enough = expected >= 5  # chi-square wants five per cell; the rest is one cell
    observed = [*counts[enough], counts[~enough].sum()] if (~enough).any() else counts
    wanted = [*expected[enough], expected[~enough].sum()] if (~enough).any() else expected
    assert stats.chisquare(observed, wanted).pvalue > 1e-4


@pytest.mark.parametrize("what, lag", list(itertools.product(["seeds", "positions"], [1, 2, 256])))
def test_neighbours_are_independent(stats: Any, what: str, lag: int) -> None:
    tokens = draw(what, 1.0)
    table = np.zeros((7, 7))
    np.add.at(table, (np.minimum(tokens[:-lag], 6), np.minimum(tokens[lag:], 6)), 1)
    result = stats.chi2_contingency(table)
    assert result.pvalue > 1e-4


def test_noise_is_gumbel(stats: Any) -> None:
    """Along ids, positions and seeds, each with the other two fixed, for several fixed values."""
    count = np.arange(100_000)
    for fixed in (0, 1, 2**31 - 1):
        along = (
            gumbel_noise(jnp.uint32(fixed), jnp.int32(fixed), jnp.asarray(count, jnp.int32)),
            gumbel_noise(jnp.uint32(fixed), jnp.asarray(count, jnp.int32), jnp.int32(fixed)),
            gumbel_noise(jnp.asarray(count, jnp.uint32), jnp.int32(fixed), jnp.int32(fixed)),
        )
        for noise in along:
            assert stats.kstest(np.asarray(noise), stats.gumbel_r.cdf).pvalue > 1e-4


def test_rows_of_noise_are_uncorrelated() -> None:
    """Between neighbouring positions and seeds, at the same id and at ids that are shifted."""
    ids = jnp.arange(50_000, dtype=jnp.int32)
    base = np.asarray(gumbel_noise(jnp.uint32(7), jnp.int32(100), ids))
    others = {
        "next position": gumbel_noise(jnp.uint32(7), jnp.int32(101), ids),
        "next seed": gumbel_noise(jnp.uint32(8), jnp.int32(100), ids),
        "seed and position swapped": gumbel_noise(jnp.uint32(100), jnp.int32(7), ids),
    }
    for name, other in others.items():
        for shift in (0, 1, 2, 1000):
            r = np.corrcoef(base[: base.size - shift], np.asarray(other)[shift:])[0, 1]
            assert abs(r) < 5 / np.sqrt(base.size - shift), (name, shift)


def test_every_bit_of_the_input_matters() -> None:
    """Flipping any one bit of seed or position gives noise that has nothing to do with the old."""
    ids = jnp.arange(4_000, dtype=jnp.int32)
    base = np.asarray(gumbel_noise(jnp.uint32(99), jnp.int32(1234), ids))
    for bit in range(32):
        seed, position = jnp.uint32(99 ^ (1 << bit)), jnp.int32(np.int32(np.uint32(1234 ^ (1 << bit))))
        for other in (gumbel_noise(seed, jnp.int32(1234), ids), gumbel_noise(jnp.uint32(99), position, ids)):
            assert abs(np.corrcoef(base, np.asarray(other))[0, 1]) < 5 / np.sqrt(base.size), bit


def test_the_upper_tail_reaches_rare_tokens() -> None:
    """Noise above 12 and 15 comes as often as it should; a tail cut at 24 bits would show here."""
    ids = jnp.arange(2**24, dtype=jnp.int32)

    def beyond(seed: jax.Array) -> list[jax.Array]:
        noise = gumbel_noise(seed, jnp.int32(3), ids)
        return [(noise > x).sum() for x in (12.0, 15.0)]

    tail = jax.jit(beyond, compiler_options={"xla_backend_optimization_level": 2})  # 2**27 values, one program
    seen = np.sum([np.asarray(tail(jnp.uint32(seed))) for seed in range(8)], axis=0)
    for count, threshold in zip(seen, (12.0, 15.0), strict=True):
        expected = -np.expm1(-np.exp(-threshold)) * 8 * 2**24
        assert abs(count - expected) < 4.5 * np.sqrt(expected), threshold


def test_noise_is_always_finite() -> None:
    noise = gumbel_noise(jnp.uint32(0), jnp.int32(0), jnp.arange(2**22, dtype=jnp.int32))
    assert bool(jnp.isfinite(noise).all())
