# SPDX-License-Identifier: Apache-2.0
"""Reads the arguments, refuses what cannot work, and runs the sections that were asked for."""

import argparse
import os
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import jax

from benchmarks import facts
from benchmarks.gpu import book, processes
from benchmarks.gpu.sections import SECTIONS
from pallas_kernels import tuning


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description="Check and time every kernel on this GPU, and find the best tiles."
    )
    made.add_argument(
        "--section",
        nargs="+",
        action="extend",
        metavar="NAME",
        help="sections to run (default: all); `check`, `engine` and `time` select all that begin so",
    )
    made.add_argument("--seconds", type=float, default=500.0, help="budget for all sections together (%(default)s)")
    made.add_argument("--out", type=Path, help="folder for the results (default: benchmarks/results/DATE-DEVICE)")
    made.add_argument(
        "--seed", type=int, help="seed of the random inputs (default: the time; recorded with the results)"
    )
    made.add_argument("--size", choices=("full", "tiny"), default="full", help="tiny: toy shapes, on any backend")
    made.add_argument(
        "--apart",
        action=argparse.BooleanOptionalAction,
        help="run the engine sections in separate processes (default: with --size full)",
    )
    made.add_argument("--list", action="store_true", help="print the sections and exit")
    return made


def chosen(names: Sequence[str] | None, made: argparse.ArgumentParser) -> list[book.Section]:
    """The sections of these names, or of names that begin with them up to an underscore; all if none is given."""
    if names is None:
        return list(SECTIONS)
    found = {n: [s for s in SECTIONS if s.name == n or s.name.startswith(f"{n}_")] for n in names}
    for name, sections in found.items():
        if not sections:
            made.error(f"no section {name!r}; there are {', '.join(s.name for s in SECTIONS)}")
    return [s for s in SECTIONS if any(s in sections for sections in found.values())]


def with_ceilings(sections: list[book.Section], out: Path) -> list[book.Section]:
    """Measure the machine first where something is compared with it and these results do not say."""
    wanted = any(s.needs_ceilings for s in sections) and all(s.name != "machine" for s in sections)
    return [SECTIONS[0], *sections] if wanted and not book.read_rows(out / "machine.json") else sections


def refusal(tiny: bool) -> str | None:
    """Why this cannot run here, in one line."""
    backend = jax.default_backend()
    if backend != "gpu" and not tiny:
        return (
            f"the run book measures a GPU and jax's default backend here is {backend!r}: run it where there is an "
            "NVIDIA GPU and jax[cuda13] is installed, or see it work with --size tiny"
        )
    try:
        jax.devices("cpu")
    except RuntimeError:
        return "check_sampling compares with the CPU and JAX_PLATFORMS excludes it: unset JAX_PLATFORMS"
    return None


def main(arguments: Sequence[str]) -> int:
    """0: all that ran was right. 1: a row or a section failed, or nothing could run. 2: wrong usage."""
    made = parser()
    given = made.parse_args(arguments)
    if given.list:
        for section in SECTIONS:
            print(f"{section.name:<16}{section.about}")
        return 0
    sections = chosen(given.section, made)
    tiny = given.size == "tiny"
    separate = (not tiny if given.apart is None else given.apart) and processes.needed(sections)
    if separate:
        processes.keep_small()
    refused = refusal(tiny)
    if not given.seconds >= 0:  # nor NaN
        made.error(f"--seconds is {given.seconds}, expected 0 or more")
    out = given.out or facts.default_out(tiny=tiny)
    if not refused:
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            refused = f"cannot make the folder for the results: {error}; name another with --out"
    if refused:
        print(f"error: {refused}")
        return 1
    warnings.filterwarnings("ignore", message="The Pallas Triton backend is deprecated")
    settings = book.Settings(
        out=out,
        tiny=tiny,
        seed=int(time.time()) if given.seed is None else given.seed,
        seconds=given.seconds,
        table=None if tiny else tuning.TABLE,
    )
    told = facts.collect()
    print(f"{told['machine']['device']}, jax {told['machine']['jax']}, seed {settings.seed}, {os.cpu_count()} CPUs")
    run = processes.run if separate else book.run
    return int(run(with_ceilings(sections, settings.out), settings, told) > 0)
