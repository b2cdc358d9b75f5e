# SPDX-License-Identifier: Apache-2.0
"""The compiled sizes: each size has a bucket, no bucket is much larger than its sizes, and there are few."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from jaxserve.engine.buckets import Available, Buckets, fitting, ladder

sizes = st.integers(1, 5000)


def test_the_ladder_written_out() -> None:
    assert ladder(512) == (1, 2, 4, 8, 16, 32, 64, 96, 128, 192, 256, 384, 512)
    assert ladder(1) == (1,)
    assert ladder(33) == (1, 2, 4, 8, 16, 32, 33)
    assert ladder(100) == (1, 2, 4, 8, 16, 32, 64, 96, 100)
    assert Buckets.of(8, 512, 1).mixed == (64, 96, 128, 192, 256, 384, 512)
    assert Buckets.of(8, 100, 1).mixed == (64, 96, 100) and Buckets.of(8, 16, 1).mixed == (16,)


@given(sizes)
def test_a_ladder_ends_at_its_top_and_wastes_at_most_half(top: int) -> None:
    steps = ladder(top)
    assert steps[-1] == top and steps == tuple(sorted(set(steps)))
    assert len(steps) <= 6 + 2 * max(0, top.bit_length() - 5)
    for low, high in pairwise(steps):
        assert high <= 2 * low and (low < 64 or high <= 1.5 * low)


@given(sizes, st.data())
def test_fitting_is_the_smallest_that_holds(top: int, data: st.DataObject) -> None:
    steps, size = ladder(top), data.draw(st.integers(1, top))
    assert fitting(steps, size) == min(step for step in steps if step >= size)


@given(st.integers(1, 600), st.integers(0, 4096), st.integers(1, 512))
def test_every_possible_step_has_a_bucket(rows: int, more: int, score_rows: int) -> None:
    buckets = Buckets.of(rows, rows + more, score_rows)
    assert buckets.decode[-1] == rows and buckets.mixed[-1] == rows + more
    assert fitting(buckets.mixed, 1) == buckets.mixed[0] >= min(64, rows + more)
    for heads in (buckets.heads, buckets.scoring_heads):
        assert heads == tuple(sorted(heads)) and heads[-1] == buckets.entries == rows + score_rows
        assert set(heads) <= set(buckets.heads)
    # Only decode buckets meet the smaller heads; whoever asks for scores of any kind finds a head too.
    assert {fitting(buckets.scoring_heads, size) for size in range(1, buckets.entries + 1)} <= set(buckets.heads)


def test_available_sizes_grow() -> None:
    available = Available((("decode", 8), ("decode", 1)))
    assert [available.fitting("decode", size) for size in (1, 2, 8)] == [1, 8, 8]
    available.add("decode", 4)
    available.add("mixed", 64)
    assert [available.fitting("decode", size) for size in (2, 4, 5)] == [4, 4, 8]
    assert available.fitting("mixed", 1) == 64
