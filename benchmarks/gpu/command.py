# SPDX-License-Identifier: Apache-2.0
"""The command line: reads the arguments, rejects what cannot run, and runs the chosen sections."""

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
        prog="python -m benchmarks.gpu",
        description="Check and time the kernels and the engine on this GPU, and find the best tiles.",
    )
    made.add_argument(
        "--section",
        nargs="+",
        action="extend",
        metavar="NAME",
        help="sections to run (default: all); check, engine and time each select all sections of their kind",
    )
    made.add_argument(
        "--seconds", type=float, default=500.0, help="time budget for all sections together (default: %(default)s)"
    )
    made.add_argument("--out", type=Path, help="folder for the results (default: benchmarks/results/DATE-DEVICE)")
    made.add_argument(
        "--seed",
        type=int,
        help="seed of the random inputs (default: the current time, recorded with the results)",
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
    """The sections that have these names or begin with them up to an underscore; all if `names` is None."""
    if names is None:
        return list(SECTIONS)
    found = {n: [s for s in SECTIONS if s.name == n or s.name.startswith(f"{n}_")] for n in names}
    for name, sections in found.items():
        if not sections:
            made.error(f"unknown section {name!r}; choose from {', '.join(s.name for s in SECTIONS)}")
    return [s for s in SECTIONS if any(s in sections for sections in found.values())]


def with_ceilings(sections: list[book.Section], out: Path) -> list[book.Section]:
    """Adds the `machine` section if a section compares with its results and the folder lacks them."""
    wanted = any(s.needs_ceilings for s in sections) and all(s.name != "machine" for s in sections)
    return [SECTIONS[0], *sections] if wanted and not book.read_rows(out / "machine.json") else sections


def refusal(tiny: bool) -> str | None:
    """Why the run book cannot run here, in one line; None if it can."""
    backend = jax.default_backend()
    if backend != "gpu" and not tiny:
        return (
            f"the run book measures a GPU, but JAX's default backend is {backend!r}: run it on a machine with an "
            "NVIDIA GPU and jax[cuda13], or try it with --size tiny"
        )
    try:
        jax.devices("cpu")
    except RuntimeError:
        return "check_sampling needs JAX's CPU backend, which JAX_PLATFORMS excludes: unset JAX_PLATFORMS"
    return None


def main(arguments: Sequence[str]) -> int:
    """Exit status 0: all results are right; 1: a row or section failed, or nothing could run; 2: wrong usage."""
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
            refused = f"cannot create the results folder: {error}; choose another with --out"
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
    origin = facts.collect()
    print(f"{origin['machine']['device']}, jax {origin['machine']['jax']}, seed {settings.seed}, {os.cpu_count()} CPUs")
    run = processes.run if separate else book.run
    return int(run(with_ceilings(sections, settings.out), settings, origin) > 0)
