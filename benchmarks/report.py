# SPDX-License-Identifier: Apache-2.0
"""Writes the performance tables of benchmarks/README.md and their picture from benchmarks/results.

    python -m benchmarks.report [--check]

Everything between the two markers in that README is replaced, so that every figure there comes from a file. Where
several files hold the same measurement of one machine, the newest counts. With --check nothing is written; the exit
status is 1 if the README or the picture is out of date. A results file of an unknown kind (report_kinds.py,
report_gpu.py) is an error, because its figures would be missing.
"""

import argparse
import json
import sys
import textwrap
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import report_gpu, report_picture
from benchmarks.report_kinds import KINDS, ResultKind
from benchmarks.report_tables import MISSED

BEGIN, END = "<!-- performance:begin -->", "<!-- performance:end -->"
ABOUT = """
`python -m benchmarks.report` writes this section from the files in [results](results); each table links to its file.
Comparisons are medians of rounds in which the sides take turns. `vs NAME` is jaxserve's output tokens per second
divided by the other side's, and `TTFT ratio` is the other side's time to first token divided by jaxserve's: above 1,
jaxserve is ahead. The model `demo` is part of the package; `110m` and `1b` are Llamas with random weights. On CPUs
results before 2026-12 are in float32, and later ones in the dtype that `auto` picks, except where a table names each
server's setting.
""".strip()
TILES = "tuning.json"  # lies beside the sections of a GPU run, but is no result
PICTURE = Path("pictures", "performance.svg")
_FOLDER = Path(__file__).parent


class ReportError(Exception):
    """The results or the README are not in the expected form."""


@dataclass(frozen=True)
class Result:
    path: Path  # relative to benchmarks/
    content: dict[str, Any]
    beside: tuple[str, ...]  # files of the same name, such as a plot

    @property
    def machine(self) -> str:
        content = self.content
        device, count = content["machine"]["device"], content["machine"]["devices"]
        if content["machine"]["backend"] == "cpu":
            return content.get("processor", device)
        return device if count == 1 else f"{count} x {device}"

    @property
    def link(self) -> str:
        parts = [f"[{self.path.name}]({self.path.as_posix()})"]
        parts += [f"[{Path(name).suffix[1:]}]({self.path.with_name(name).as_posix()})" for name in self.beside]
        return " ".join(parts)

    @property
    def origin(self) -> str:
        git = self.content["git"]
        changed = " with changes" if git["dirty"] else ""
        return f"{self.content['date'][:10]}, commit {git['commit'][:7]}{changed}"


def read(folder: Path, base: Path) -> list[Result]:
    """All results in the folder, newest first, with paths relative to `base`."""
    found: list[Result] = []
    for path in sorted(folder.rglob("*.json")):
        if path.parent != folder and path.name == TILES:
            continue
        try:
            content = json.loads(path.read_text())
        except ValueError as error:
            raise ReportError(f"{path} is not JSON: {error}; fix or remove it") from error
        if not isinstance(content, dict) or not {"date", "git", "machine"} <= content.keys():
            raise ReportError(f"{path} lacks its date, machine or commit; remove it")
        plot = path.with_suffix(".svg")
        found.append(Result(path.relative_to(base), content, (plot.name,) if plot.exists() else ()))
    return sorted(found, key=lambda result: result.content["date"], reverse=True)


def kind_of(result: Result) -> ResultKind | None:
    """None for a section of the GPU run book."""
    if report_gpu.is_section(result.content):
        return None
    for kind in KINDS:
        if kind.fits(result.content):
            return kind
    raise ReportError(f"{result.path} has an unknown kind; add it to benchmarks/report_kinds.py or remove the file")


def of_kind(kind: ResultKind, results: Sequence[Result]) -> list[str]:
    """A table for each file that holds the newest measurement of any subject."""
    seen: set[Hashable] = set()
    tables: list[tuple[str, list[str]]] = []
    for result in results:
        try:
            rows = {
                about: row for about, row in kind.rows(result.content).items() if (result.machine, about) not in seen
            }
            if not rows:
                continue
            seen |= {(result.machine, about) for about in rows}
            source = f"From {result.link}: {result.origin}, {result.machine}."
            tables.append((result.path.name, [*kind.lines(result.content, rows), "", source]))
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise ReportError(f"{result.path} lacks fields of its kind: {error!r}") from error
    # By name, so that the order does not depend on which was measured last.
    return [line for _, lines in sorted(tables) for line in ["", *lines]]


def on_gpus(results: Sequence[Result]) -> list[str]:
    newest: dict[tuple[str, str], Result] = {}
    for result in results:
        if report_gpu.counts(result.content):
            newest.setdefault((result.machine, result.content["section"]), result)
    if not newest:
        return ["", "Nothing has been measured on a GPU yet."]
    lines: list[str] = []
    for machine in sorted({machine for machine, _ in newest}):
        own = [result for (where, _), result in sorted(newest.items()) if where == machine]
        try:
            shown = report_gpu.lines([(one.content, f"{one.link}, {one.origin}") for one in own])
        except (KeyError, TypeError, ValueError) as error:
            raise ReportError(f"{own[0].path.parent} lacks fields that the run book writes: {error!r}") from error
        lines += ["", f"{machine}:", "", *shown]
    return lines


def section(results: Sequence[Result]) -> str:
    """The text between the markers."""
    kinds = [(result, kind_of(result)) for result in results]
    body: list[str] = []
    for kind in KINDS:
        own = [result for result, its in kinds if its is kind]
        if own:
            body += ["", f"### {kind.title}", *of_kind(kind, own)]
    body += ["", "### On GPUs", *on_gpus([result for result, its in kinds if its is None])]
    missed = sum(line.count(MISSED) for line in body)
    summary = f"Targets missed: {missed}, each marked {MISSED}." if missed else "Every target measured so far is met."
    head = ["## Results", "", textwrap.fill(ABOUT, 120), "", summary]
    return "\n".join([*head, *body])


def picture(results: Sequence[Result]) -> str | None:
    """The SVG of the results whose figures count."""
    counted = [result for result in results if kind_of(result) is not None]
    return report_picture.draw([(result.machine, result.content) for result in counted])


def renewed(readme: str, text: str) -> str:
    """The README with this text between its markers."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ReportError(f"the README lacks {BEGIN}, or {END} after it; put both where the section belongs")
    return f"{before}{BEGIN}\n{text}\n{END}{after}"


def main(arguments: Sequence[str] | None = None, *, folder: Path = _FOLDER) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report", description="Write the tables of benchmarks/README.md and their picture."
    )
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if anything is out of date")
    options = parser.parse_args(arguments)
    readme = folder / "README.md"
    try:
        results = read(folder / "results", folder)
        wanted = {readme: renewed(readme.read_text(), section(results)), folder / PICTURE: picture(results)}
    except ReportError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    stale = {path: text for path, text in wanted.items() if text and not (path.exists() and path.read_text() == text)}
    if options.check and stale:
        names = " and ".join(path.name for path in stale)
        print(f"error: {names} out of date with benchmarks/results; run python -m benchmarks.report", file=sys.stderr)
        return 1
    for path, text in stale.items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
