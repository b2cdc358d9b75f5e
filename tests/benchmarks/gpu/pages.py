# SPDX-License-Identifier: Apache-2.0
"""Runs the run book with toy shapes, makes pages for its results, and fakes its clock."""

import json
from pathlib import Path
from typing import Any

from benchmarks.gpu import book, command
from benchmarks.gpu.sections import SECTIONS

FACTS = {"machine": {"device": "none"}}


def tiny(out: Path, *arguments: str) -> int:
    return command.main(["--size", "tiny", "--seed", "3", "--out", str(out), *arguments])


def read(out: Path, section: str) -> dict[str, Any]:
    return json.loads((out / f"{section}.json").read_text())


def settings(out: Path, **changes: Any) -> book.Settings:
    return book.Settings(**{"out": out, "tiny": True, "seed": 1, "seconds": 60.0, "table": None} | changes)


def a_page(out: Path, **changes: Any) -> book.Page:
    return book.Page(SECTIONS[0], settings(out, **changes), FACTS, book.time.monotonic() + 60)


class Clock:
    """Time that passes only through `pass_`, so that a busy machine changes nothing."""

    now = 100.0

    def pass_(self, seconds: float) -> None:
        self.now += seconds
