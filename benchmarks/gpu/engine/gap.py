# SPDX-License-Identifier: Apache-2.0
"""Section `engine_gap`: how long the device is idle between two steps, and what the host does meanwhile.

Two rows for each batch. `host`: the time of each part of Engine.step, measured without a trace; work that overlaps with
the device's is hidden in `read`. `trace`: the device's events during some steps. While XLA is traced it launches
kernels one by one unless --xla_enable_command_buffers_during_profiling is set, so the run book sets it.
"""

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from benchmarks.gpu.book import Page, Row
from benchmarks.gpu.dumps import trace
from benchmarks.gpu.engine.rig import Rig, rig_of
from benchmarks.gpu.times.timing import Aim

COLUMNS = ("ms", "host_ms", "read_ms", "between_us", "idle_us", "kernels", "met", "note")
TRACED_AS_RUN = "--xla_enable_command_buffers_during_profiling=true"
AIM = Aim("between_us", 50, at_most=True)


class Clock:
    """Measures the seconds spent in methods, by wrapping them."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._undo: list[Callable[[], None]] = []

    def on(self, owner: Any, name: str) -> None:
        method = getattr(owner, name)

        def timed(*args: Any, **options: Any) -> Any:
            began = time.perf_counter()
            try:
                return method(*args, **options)
            finally:
                self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began

        setattr(owner, name, timed)
        self._undo.append(lambda: delattr(owner, name))

    def off(self) -> None:
        for undo in self._undo:
            undo()


def host(rig: Rig, count: int) -> Row:
    """Milliseconds per step, in total and by part of Engine.step."""
    clock, engine = Clock(), rig.engine
    parts = ((engine.scheduler, "schedule"), (engine._batcher, "pack"), (rig.runner, "launch"))
    for owner, name in (*parts, (rig.runner, "read"), (engine.scheduler, "commit")):
        clock.on(owner, name)
    try:
        each, _ = rig.steps(count)
    finally:
        clock.off()
    row: Row = {"ms": 1e3 * each} | {f"{name}_ms": 1e3 * took / count for name, took in clock.seconds.items()}
    return row | {"host_ms": row["ms"] - row["read_ms"]}


def traced(rig: Rig, count: int) -> Row:
    """The device's trace of `count` steps."""
    with tempfile.TemporaryDirectory() as folder:
        jax.profiler.start_trace(folder)
        try:
            rig.steps(count)
            rig.engine.drain()
        finally:
            jax.profiler.stop_trace()
        lanes = trace.lanes(Path(folder))
    if not lanes:
        return {"note": "no device", "steps": count}  # in the trace, as with a CPU
    lane = max(lanes, key=lambda lane: len(lane.events))
    row: Row = {"lane": lane.name, "steps": count, "as_run": TRACED_AS_RUN in os.environ.get("XLA_FLAGS", "")}
    row |= trace.summary(lane.events, count)
    row |= {"us": row["busy_us"] + row["idle_us"], "ms": (row["busy_us"] + row["idle_us"]) / 1e3}
    return row | {"target": str(AIM), "met": AIM.met(row)}


def run(page: Page) -> None:
    rig, tiny = rig_of(page), page.settings.tiny
    count = 4 if tiny else 30
    cases = [
        (rows, context, what)
        for rows, context in (((2, 16),) if tiny else ((64, 1024), (1, 1024), (256, 1024)))
        for what in ("host", "trace")
    ]

    def measure(case: tuple[int, int, str]) -> Row:
        rows, context, what = case
        rig.fill(rows, context)
        try:
            rig.steps(4)
            return (host if what == "host" else traced)(rig, count)
        finally:
            rig.clear()

    page.each(cases, measure, name=lambda case: f"{case[2]}: {case[0]} rows at {case[1]} tokens")
