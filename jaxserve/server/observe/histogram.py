# SPDX-License-Identifier: Apache-2.0
"""Histograms with fixed bounds: single-threaded, and cheap enough to update on every token."""

from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate

FIRST_TOKEN = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
    *(160.0, 640.0, 2560.0),
)
BETWEEN_TOKENS = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
LATENCY = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0),
    *(960.0, 1920.0, 7680.0),
)
SAMPLES = (1, 2, 5, 10, 20)
HTTP = (0.005, 0.025, 0.1, 0.5, 1.0, 5.0, 30.0)


def token_counts(longest: int) -> tuple[int, ...]:
    """Bucket bounds 1, 2, 5, 10, ... up to the longest sequence."""
    bounds = [step * 10**power for power in range(9) for step in (1, 2, 5)]
    return tuple(bound for bound in bounds if bound <= longest)


class Histogram:
    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(self.bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float, count: int = 1) -> None:
        """Add `value` `count` times."""
        self.counts[bisect_left(self.bounds, value)] += count
        self.sum += value * count

    def buckets(self) -> list[tuple[str, float]]:
        """Cumulative counts by upper bound, in Prometheus's form."""
        names = [*(repr(float(bound)) for bound in self.bounds), "+Inf"]
        return list(zip(names, map(float, accumulate(self.counts)), strict=True))
