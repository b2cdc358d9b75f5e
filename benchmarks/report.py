# SPDX-License-Identifier: Apache-2.0
"""The README's performance section, from benchmarks/results: `python -m benchmarks.report [--check]`.

Whatever stands between its two markers in the README is replaced, so that no figure stands there that is in no file.
Of what several files tell of one thing on one machine the newest counts. With --check nothing is written: the exit
status is 1 if the README is not what the results give. A file of no kind known (report_kinds.py, report_gpu.py) is an
error: a result that nobody sees is worse than none.
"""

import argparse
import json
import sys
import textwrap
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import report_gpu
from benchmarks.report_kinds import KINDS, MISSED, Kind

BEGIN, END = "<!-- performance:begin -->", "<!-- performance:end -->"
ABOUT = """
Only what was measured: `python -m benchmarks.report` writes this section from the files of `benchmarks/results`, and
each table names its file. Compared are medians of rounds in which the sides take turns; `against` is jaxserve's output
tokens per second in times of the peer's, `its TTFT` the peer's time to the first token in times of jaxserve's: above 1
jaxserve is ahead. Models: `demo`, the one in the package, and `110m`, a Llama of random weights; on CPUs in float32.
""".strip()
TILES = "tuning.json"  # beside the sections of a run on a GPU; not a result
_ROOT = Path(__file__).parents[1]


class ReportError(Exception):
    """Something that the results or the README must be mended for."""


@dataclass(frozen=True)
class Result:
    path: Path  # from the repository's root
    content: dict[str, Any]
    beside: tuple[str, ...]  # files of the same name: a plot

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


def read(folder: Path, root: Path) -> list[Result]:
    """All results, the newest first."""
    found: list[Result] = []
    for path in sorted(folder.rglob("*.json")):
        if path.parent != folder and path.name == TILES:
            continue
        try:
            content = json.loads(path.read_text())
        except ValueError as error:
            raise ReportError(f"{path} is not JSON: {error}; remove it or mend it") from error
        if not isinstance(content, dict) or not {"date", "git", "machine"} <= content.keys():
            raise ReportError(f"{path} does not say when, where and from which commit it is; remove it")
        plot = path.with_suffix(".svg")
        found.append(Result(path.relative_to(root), content, (plot.name,) if plot.exists() else ()))
    return sorted(found, key=lambda result: result.content["date"], reverse=True)


def kind_of(result: Result) -> Kind | None:
    """None: a section of the GPU run book."""
    if report_gpu.is_section(result.content):
        return None
    for kind in KINDS:
        if kind.fits(result.content):
            return kind
    raise ReportError(f"{result.path} is of no kind that is known; teach it to benchmarks/report_kinds.py or remove it")


def of_kind(kind: Kind, results: Sequence[Result]) -> list[str]:
    """A table from each file that has the newest word on anything."""
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
            raise ReportError(f"{result.path} lacks what its kind has: {error!r}") from error
    # By name: their order then does not depend on which was measured last.
    return [line for _, lines in sorted(tables) for line in ["", *lines]]


def on_gpus(results: Sequence[Result]) -> list[str]:
    newest: dict[tuple[str, str], Result] = {}
    for result in results:
        if report_gpu.counts(result.content):
            newest.setdefault((result.machine, result.content["section"]), result)
    if not newest:
        return ["", "No figure has been measured on a GPU yet."]
    lines: list[str] = []
    for machine in sorted({machine for machine, _ in newest}):
        own = [result for (where, _), result in sorted(newest.items()) if where == machine]
        try:
            shown = report_gpu.lines([(one.content, f"{one.link}, {one.origin}") for one in own])
        except (KeyError, TypeError, ValueError) as error:
            raise ReportError(f"{own[0].path.parent} lacks what the run book writes: {error!r}") from error
        lines += ["", f"{machine}:", "", *shown]
    return lines


def section(results: Sequence[Result]) -> str:
    """What stands between the markers."""
    kinds = [(result, kind_of(result)) for result in results]
    body: list[str] = []
    for kind in KINDS:
        own = [result for result, its in kinds if its is kind]
        if own:
            body += ["", f"### {kind.title}", *of_kind(kind, own)]
    body += ["", "### On GPUs", *on_gpus([result for result, its in kinds if its is None])]
    missed = sum(line.count(MISSED) for line in body)
    told = f"Aims missed, and marked so: {missed}." if missed else "No aim of those measured is missed."
    head = ["## Performance", "", textwrap.fill(ABOUT, 120), "", told]
    return "\n".join([*head, *body])


def renewed(readme: str, text: str) -> str:
    """The README with this between its markers."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ReportError(f"the README lacks {BEGIN} or, behind it, {END}; put both where the section shall stand")
    return f"{before}{BEGIN}\n{text}\n{END}{after}"


def main(arguments: Sequence[str] | None = None, *, root: Path = _ROOT) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report", description="The README's performance section."
    )
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if the README is not up to date")
    options = parser.parse_args(arguments)
    readme = root / "README.md"
    try:
        old = readme.read_text()
        new = renewed(old, section(read(root / "benchmarks" / "results", root)))
    except ReportError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if options.check:
        if old != new:
            print("error: the README's figures are not those of benchmarks/results; run python -m benchmarks.report")
        return int(old != new)
    if old != new:
        readme.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
