# SPDX-License-Identifier: Apache-2.0
"""Times per call, targets and sets of inputs."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import models
from benchmarks.gpu.times import timing
from benchmarks.gpu.times.attention import decode_case, decode_target
from tests.benchmarks.gpu.pages import Clock


def test_a_time_lost_in_noise_meets_no_target() -> None:
    case = decode_case(models.TINY, 2, 24)
    row = timing.achieved(case, timing.Timing(-1.5, float("inf"), 3.0), timing.Ceilings(None, None))
    assert row["us"] is None and row["noise_us"] == -1.5
    assert timing.Aim("us", 10, at_most=True).met(row) is None


def test_slope_cancels_what_is_the_same(clock: Clock) -> None:
    def program(calls: int) -> Callable[..., float]:
        return lambda *_: clock.pass_(0.004 + calls * 0.001) or 0.0

    programs = {n: program(n) for n in (2, 6)}
    measured = timing.slope(programs, timing.Arrays(0.0, None, [None]), donate=False)
    assert measured == pytest.approx((1000, 0, 4000))


def test_targets() -> None:
    assert decode_target(64, 1024) == timing.Aim("copy_pct", 70)
    assert decode_target(256, 1024) == timing.Aim("copy_pct", 85)
    assert decode_target(1, 1024) is None
    case = decode_case(models.LLAMA_8B, 64, 4096)
    floor_us = case.bytes / 4.3e6
    row = timing.achieved(case, timing.Timing(floor_us / 0.9, 0.0, 0.0), timing.Ceilings(4300.0, 790.0))
    assert row["met"] is True and row["copy_pct"] == pytest.approx(90)
    row = timing.achieved(case, timing.Timing(floor_us / 0.8, 0.0, 0.0), timing.Ceilings(4300.0, 790.0))
    assert row["met"] is False
    row = timing.achieved(case, timing.Timing(floor_us, 0.0, 0.0), timing.Ceilings(None, None))
    assert row["met"] is None and row["target"] == ">=85 copy_pct"
    assert timing.Aim("us", 10, at_most=True).met({"us": 9.0}) is True


def test_sets_of_inputs_differ_and_exceed_the_cache() -> None:
    case = decode_case(models.LLAMA_8B, 8, 1024)
    arrays = case.abstract()
    assert len(arrays.sets) * case.bytes > timing.BEYOND_CACHE
    tables = np.concatenate([np.asarray(ragged.block_tables) for ragged in _walks(case)])
    assert np.unique(tables).size == tables.size


def _walks(case: timing.Timed) -> Any:
    """The batches, from arrays made with a stand-in for the pool."""
    return case.arrays((jnp.zeros(()),) * 2).sets
