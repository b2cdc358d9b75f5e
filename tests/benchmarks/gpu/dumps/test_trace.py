# SPDX-License-Identifier: Apache-2.0
"""Traces are read right, and a CPU has none."""

import gzip
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from benchmarks.gpu.dumps import trace
from benchmarks.gpu.dumps.trace import Event


def events(*programs: str) -> list[Event]:
    """Events of 10 us: 1 us apart within a program, 30 us apart between programs."""
    found: list[Event] = []
    at, before = 0.0, None
    for program in programs:
        at += 30 if before not in (None, program) else 1
        found.append(Event(at, at + 10, program))
        at, before = at + 10, program
    return found


def test_gaps_between_programs_by_their_names() -> None:
    found = trace.summary(events(*(["model"] * 4 + ["head"]) * 3), 3)
    assert found["ends_by"] == "names" and found["kernels"] == 5 and found["busy_us"] == pytest.approx(50)
    assert found["between_us"] == pytest.approx(5 * 30 / 3) and found["idle_us"] == pytest.approx((5 * 30 + 9) / 3)


def test_gaps_between_programs_by_their_size() -> None:
    named = events(*(["model"] * 4 + ["head"]) * 3)
    found = trace.summary([Event(event.start, event.end, "") for event in named], 3)
    assert found["ends_by"] == "size" and found["between_us"] == pytest.approx(5 * 30 / 3)
    assert found["largest_us"] == pytest.approx(30)


def test_kernels_that_overlap_leave_no_gap() -> None:
    both = [Event(0, 100, "a"), Event(10, 20, "a"), Event(50, 120, "a"), Event(125, 130, "a")]
    assert trace.idle(both) == [(5, "a", "a")]


def test_a_cpu_has_no_lane(tmp_path: Path) -> None:
    assert trace.lanes(tmp_path) == []
    with jax.profiler.trace(tmp_path):
        jax.block_until_ready(jnp.ones(4) + 1)
    assert trace.lanes(tmp_path) == []


def test_events_are_read_as_jax_writes_them(tmp_path: Path) -> None:
    """The host's threads, renamed to streams of a device: their events have the same format."""
    with jax.profiler.trace(tmp_path):
        jax.block_until_ready(jnp.ones(4) + 1)
    [path] = tmp_path.rglob("*.trace.json.gz")
    text = gzip.decompress(path.read_bytes()).decode().replace("/host:CPU", "/device:GPU:0").replace("tf_", "Stream ")
    path.write_bytes(gzip.compress(text.replace('"hlo_op"', '"hlo_module"').encode()))
    [lane] = trace.lanes(tmp_path)
    assert lane.name == "/device:GPU:0" and lane.events and all(e.end >= e.start >= 0 for e in lane.events)
    assert any(event.program for event in lane.events)
    assert trace.summary(lane.events, 1)["busy_us"] > 0
