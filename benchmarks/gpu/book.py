# SPDX-License-Identifier: Apache-2.0
"""Runs sections one after the other within a time budget and writes their results: a JSON file per section, and tables.

Knows nothing about kernels. A section's file is rewritten after every row, so an interrupted run loses nothing. If a
section raises, the error is recorded and the next section runs.
"""

import dataclasses
import json
import math
import os
import time
import traceback
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

type Row = dict[str, Any]

_FIRST_COLUMN = 44


@dataclasses.dataclass(frozen=True)
class Settings:
    out: Path
    tiny: bool  # toy shapes, on any backend
    seed: int
    seconds: float  # for all sections together
    table: Path | None  # the tile table that the sweep updates


@dataclasses.dataclass(frozen=True)
class Section:
    name: str
    about: str
    share: float  # of the budget, relative to the others
    columns: tuple[str, ...]  # of the printed table; the file holds more
    run: Callable[["Page"], None]
    needs_ceilings: bool = False  # compares its times with the rates that `machine` measured


class Page:
    """One section's results while it runs."""

    def __init__(self, section: Section, settings: Settings, facts: Row, deadline: float) -> None:
        self.section, self.settings, self.deadline = section, settings, deadline
        # Each section draws the same numbers whether it runs alone or among others.
        self.rng = np.random.default_rng([settings.seed, zlib.crc32(section.name.encode())])
        self.rows: list[Row] = []
        self.skipped: list[str] = []
        self.error: str | None = None
        self.complete = False
        self._facts, self._started = facts, time.monotonic()
        self._ended: float | None = None
        self._write()

    @property
    def failed(self) -> int:
        """Rows that are wrong or raised, plus one if the section itself raised."""
        return sum(row.get("ok") is False for row in self.rows) + (self.error is not None)

    @property
    def seconds(self) -> float:
        return (self._ended or time.monotonic()) - self._started

    def time_left(self) -> float:
        return self.deadline - time.monotonic()

    def add(self, case: str, **values: Any) -> None:
        self.rows.append({"case": case, **values})
        self._write()

    def skip(self, case: str) -> None:
        self.skipped.append(case)
        self._write()

    def each[C](self, cases: Iterable[C], measure: Callable[[C], Row], *, name: Callable[[C], str]) -> None:
        """Adds a row per case. A case that raises gives a failed row; cases after the deadline are skipped."""
        for case in cases:
            if self.time_left() <= 0:
                self.skip(name(case))
                continue
            started = time.monotonic()
            try:
                row = measure(case)
            except Exception as error:
                row = {"ok": False, "error": describe(error)}
            self.add(name(case), **row, seconds=time.monotonic() - started)

    def close(self) -> None:
        self.complete = self.error is None and not self.skipped
        self._ended = time.monotonic()
        self._write()

    def _write(self) -> None:
        write_json(
            self.settings.out / f"{self.section.name}.json",
            {
                "section": self.section.name,
                "about": self.section.about,
                "complete": self.complete,
                "error": self.error,
                "size": "tiny" if self.settings.tiny else "full",
                "seed": self.settings.seed,
                "seconds": round(self.seconds, 3),
                **self._facts,
                "rows": self.rows,
                "skipped": self.skipped,
            },
        )


def describe(error: BaseException) -> str:
    """An exception as one short line: compilers' messages can be pages long."""
    return f"{type(error).__name__}: {str(error).strip()}".split("\n")[0][:400]


def _plain(value: Any) -> Any:
    """The value as JSON can hold it: numpy values become Python's, NaN and infinity become strings."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def write_json(path: Path, value: Any) -> None:
    """Replaces the file atomically, so that a killed run never leaves a partial file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(_plain(value), indent=1, allow_nan=False) + "\n")
    os.replace(partial, path)


def read_rows(path: Path) -> dict[str, Row]:
    """The rows of a section's file by case; empty if the file is missing or incomplete."""
    try:
        return {row["case"]: row for row in json.loads(path.read_text())["rows"]}
    except (OSError, ValueError, KeyError):
        return {}


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return str(value)


def table(page: Page) -> str:
    lines = [f"\n{page.section.name}: {page.section.about}"]
    head = "".join(f"{name:>13}" for name in page.section.columns)
    lines.append(f"  {'case':<{_FIRST_COLUMN}}{head}")
    for row in page.rows:
        cells = "".join(f"{_cell(row.get(name))[:12]:>13}" for name in page.section.columns)
        lines.append(f"  {row['case'][:_FIRST_COLUMN]:<{_FIRST_COLUMN}}{cells}")
        if row.get("error"):
            lines.append(f"    error: {row['error'][:140]}")
    if page.skipped:
        lines.append(f"  out of time, skipped {len(page.skipped)}: {', '.join(page.skipped)[:120]}")
    if page.error:
        lines.append(f"  the section failed: {page.error}")
    return "\n".join(lines)


def run(sections: Sequence[Section], settings: Settings, facts: Row) -> int:
    """Runs the sections within the budget; returns how many rows and sections failed."""
    end = time.monotonic() + settings.seconds
    pages = []
    for i, section in enumerate(sections):
        now = time.monotonic()
        # The later sections share the time that earlier ones did not use.
        share = section.share / sum(later.share for later in sections[i:])
        page = Page(section, settings, facts, now + max(end - now, 0) * share)
        pages.append(page)
        try:
            section.run(page)
        except Exception as error:
            traceback.print_exc()
            page.error = describe(error)
        page.close()
        print(table(page), flush=True)
    print("\nsummary")
    for page in pages:
        state = "FAILED" if page.failed else "complete" if page.complete else "partial"
        counts = f"{len(page.rows):4} rows {page.failed:3} failed {len(page.skipped):3} skipped"
        print(f"  {page.section.name:<18}{state:<10}{counts} {page.seconds:7.1f} s")
    print(f"results in {settings.out}", flush=True)
    return sum(page.failed for page in pages)
