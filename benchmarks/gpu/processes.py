# SPDX-License-Identifier: Apache-2.0
"""Runs sections in separate processes, one after the other, and prints the totals.

JAX reserves most of a GPU's memory when it first uses the device and keeps it until the process ends. Therefore the
kernels' sections run in one process, those that share an engine in another, and those that start child processes in
this one, which must leave the GPU's memory free: it calls `keep_small` and computes nothing on the device.

Each process is the run book itself, started with `--no-apart`. It writes its sections' results as usual, so a process
that dies or overruns affects only its own sections. Unused time passes to the later processes.
"""

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path

from benchmarks.gpu import book, children
from benchmarks.gpu.book import Row, Section, Settings
from benchmarks.gpu.engine.gap import TRACED_AS_RUN
from jaxserve.config import EngineConfig
from jaxserve.engine.execute import jax_start

KERNELS, ENGINE, HERE = "kernels", "engine", "here"
GRACE = 60.0  # seconds that a process may overrun: a compilation cannot be interrupted


def process_of(section: Section) -> str:
    if section.name in ("engine_start", "engine_flags", "engine_peer"):
        return HERE
    return ENGINE if section.name.startswith("engine_") else KERNELS


def needed(sections: Sequence[Section]) -> bool:
    return any(process_of(section) != KERNELS for section in sections)


def keep_small() -> None:
    """Disables JAX's memory preallocation; call it before JAX first uses a device."""
    os.environ[children.PREALLOCATE] = "false"


def run(sections: Sequence[Section], settings: Settings, facts: Row) -> int:
    """Returns how many rows and sections failed."""
    end, failed = time.monotonic() + settings.seconds, 0
    groups = [(process, list(group)) for process, group in groupby(sections, process_of)]
    for place, (process, group) in enumerate(groups):
        shares = [sum(section.share for section in later) for _, later in groups[place:]]
        seconds = max(end - time.monotonic(), 0) * shares[0] / sum(shares)
        if process == HERE:
            failed += book.run(group, replace(settings, seconds=seconds), facts)
        else:
            failed += _child(group, settings, process, seconds)
    _print_all(sections, settings.out)
    return failed


def _child(group: Sequence[Section], settings: Settings, process: str, seconds: float) -> int:
    names = [section.name for section in group]
    command = [sys.executable, "-m", "benchmarks.gpu", "--no-apart", "--section", *names]
    command += ["--seconds", f"{seconds:.1f}", "--out", str(settings.out.resolve()), "--seed", str(settings.seed)]
    command += ["--size", "tiny" if settings.tiny else "full"]
    env = children.environment()
    if process == ENGINE:
        env = jax_start.environment(EngineConfig(model="any"), env)
        env["XLA_FLAGS"] = f"{env.get('XLA_FLAGS', '')} {TRACED_AS_RUN}".strip()
    print(f"\nin a separate process: {', '.join(names)}", flush=True)
    child = subprocess.Popen(command, cwd=children.ROOT, env=env, start_new_session=True)
    try:
        code = child.wait(timeout=seconds + GRACE)
    except subprocess.TimeoutExpired:
        print(f"killed: it overran its time by {GRACE:.0f} s", flush=True)
        code = 1
    finally:
        children.end(child)
    return int(code != 0)


def _print_all(sections: Sequence[Section], out: Path) -> None:
    print("\nall processes")
    for section in sections:
        rows = book.read_rows(out / f"{section.name}.json").values()
        wrong = sum(row.get("ok") is False for row in rows)
        met = [row["met"] for row in rows if row.get("met") is not None]
        targets = f"{sum(met)} of {len(met)} targets met" if met else ""
        print(f"  {section.name:<18}{len(rows):4} rows {wrong:3} failed  {targets}")
    print(f"results in {out}", flush=True)
