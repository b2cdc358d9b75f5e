# SPDX-License-Identifier: Apache-2.0
"""Reads a device's trace that jax.profiler wrote: when it computed, and when it was idle between programs."""

import gzip
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

_DERIVED = ("XLA", "Steps", "Framework", "Source", "TensorFlow", "Launch")  # threads that repeat the same events


@dataclass(frozen=True)
class Event:
    start: float  # microseconds
    end: float
    program: str  # empty if the trace does not name it


@dataclass(frozen=True)
class Lane:
    """The events of one device."""

    name: str
    events: list[Event]


def lanes(folder: Path) -> list[Lane]:
    """One lane per device in the newest trace under `folder`; none if the backend traces no device, such as a CPU.

    Reads the trace for browsers, because jax.profiler.ProfileData, which reads the other format, crashes on an event's
    stats (jax 0.11.2).
    """
    files = sorted(folder.rglob("*.trace.json.gz"), key=lambda path: path.stat().st_mtime)
    if not files:
        return []
    with gzip.open(files[-1]) as file:
        records: list[dict[str, Any]] = [event for event in json.load(file)["traceEvents"] if event]
    names = {(e["pid"], e.get("tid")): e["args"]["name"] for e in records if e.get("ph") == "M" and "name" in e["args"]}
    devices = {e["pid"]: e["args"]["name"] for e in records if e.get("name") == "process_name"}
    found: list[Lane] = []
    for pid, device in devices.items():
        if not device.startswith("/device:") or "CUSTOM" in device:
            continue
        threads = {tid: name for (of, tid), name in names.items() if of == pid and tid is not None}
        streams = {tid for tid, name in threads.items() if "Stream" in name}
        chosen = streams or {tid for tid, name in threads.items() if not name.startswith(_DERIVED)}
        events = [_event(e) for e in records if e.get("ph") == "X" and e["pid"] == pid and e.get("tid") in chosen]
        if events:
            found.append(Lane(device, sorted(events, key=lambda event: event.start)))
    return found


def _event(e: dict[str, Any]) -> Event:
    return Event(e["ts"], e["ts"] + e.get("dur", 0), str(e.get("args", {}).get("hlo_module", "")))


def idle(events: Iterable[Event]) -> list[tuple[float, str, str]]:
    """Every interval when nothing ran: its microseconds, and the programs before and after it."""
    gaps: list[tuple[float, str, str]] = []
    end, before = None, ""
    for event in events:
        if end is not None and event.start > end:
            gaps.append((event.start - end, before, event.program))
        if end is None or event.end > end:
            end, before = event.end, event.program
    return gaps


def summary(events: list[Event], steps: int) -> dict[str, Any]:
    """Averages per step, in microseconds. A step runs one program of the model and one of the head.

    `between_us` is the idle time between programs: the gaps where the program's name changes or, if the trace does not
    name programs, the largest gaps, as many as there are boundaries. All other idle time lies within programs.
    """
    gaps = idle(events)
    span = max(event.end for event in events) - events[0].start
    at_ends = [gap for gap, before, after in gaps if before != after]
    named = sum(bool(event.program) for event in events) > 0.9 * len(events) and len(at_ends) >= steps - 1
    if not named:
        at_ends = sorted((gap for gap, _, _ in gaps), reverse=True)[: 2 * steps - 1]
    total = sum(gap for gap, _, _ in gaps)
    return {
        "kernels": len(events) / steps,
        "busy_us": (span - total) / steps,
        "idle_us": total / steps,
        "between_us": sum(at_ends) / steps,
        "largest_us": float(np.max(at_ends)) if at_ends else 0.0,
        "ends_by": "names" if named else "size",
    }
