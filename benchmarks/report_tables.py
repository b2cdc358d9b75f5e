# SPDX-License-Identifier: Apache-2.0
"""What the tables of the performance report are made of."""

from collections.abc import Hashable, Mapping
from typing import Any

type Content = dict[str, Any]
type Rows = Mapping[Hashable, Any]

MISSED = "**missed**"


def judged(value: float, form: str, aim: float | None, *, at_most: bool = False) -> str:
    """The value as shown, marked if what is shown misses the target."""
    shown = format(value, form)
    if aim is None:
        return shown
    near = float(shown.replace(",", ""))
    return shown if (near <= aim if at_most else near >= aim) else f"{shown} {MISSED}"


def table(heads: list[str], rows: list[list[str]]) -> list[str]:
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    return [*lines, *(f"| {' | '.join(row)} |" for row in rows)]
