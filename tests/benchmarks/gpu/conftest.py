# SPDX-License-Identifier: Apache-2.0
"""Replaces the run book's clock."""

from types import SimpleNamespace

import pytest

from benchmarks.gpu import book
from benchmarks.gpu.times import timing
from tests.benchmarks.gpu.pages import Clock


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    fake = SimpleNamespace(perf_counter=lambda: made.now, monotonic=lambda: made.now)
    monkeypatch.setattr(timing, "time", fake)
    monkeypatch.setattr(book, "time", fake)
    return made
