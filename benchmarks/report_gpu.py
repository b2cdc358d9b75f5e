# SPDX-License-Identifier: Apache-2.0
"""Tables of the GPU run book's results: a line per section, and the rows of sections that time whole steps.

Knows the format of a section's file (gpu/book.py), not its kernels.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.report_tables import MISSED, Content, table

SHOWN = ("machine", "engine_", "time_steps")  # sections whose rows are shown one by one
COLUMNS = {
    "ms": "ms",
    "us": "us",
    "whole_s": "s in total",
    "weights_s": "s for weights",
    "first_token_s": "s to first token",
    "seconds_taken": "s",
    "tokens_per_s": "tokens/s",
    "ratio": "ratio",
    "decode_1_ms": "ms decode B=1",
    "decode_64_ms": "ms decode B=64",
    "prefill_ms": "ms prefill",
    "graphs": "CUDA graphs",
    "outside": "launched outside graphs",
    "gbps": "GB/s",
    "tflops": "TFLOP/s",
    "idle_us": "us idle",
    "copy_pct": "% of copy rate",
    "floor_pct": "% of floor",
    "state": "state",
    "target": "target",
}


def is_section(content: Content) -> bool:
    return {"section", "size", "rows", "skipped"} <= content.keys()


def counts(content: Content) -> bool:
    """Whether its figures are performance figures: full sizes, on a GPU."""
    return content["size"] == "full" and content["machine"]["backend"] == "gpu"


def lines(sections: Sequence[tuple[Content, str]]) -> list[str]:
    """The tables of one device, from its sections, each with its origin."""
    overview = table(
        ["section", "rows", "wrong", "targets met", "not run", "from"],
        [[f"{one['section']}: {one['about']}", *_state(one), source] for one, source in sections],
    )
    shown: list[str] = []
    for one, _ in sections:
        if one["section"].startswith(SHOWN) and (rows := [row for row in one["rows"] if not row.get("skipped")]):
            shown += ["", f"`{one['section']}`, {one['about']}:", "", *_rows(rows)]
    return [*overview, *shown]


def _state(content: Content) -> list[str]:
    rows = content["rows"]
    aims = [row["met"] for row in rows if row.get("met") is not None]
    wrong = sum(row.get("ok") is False for row in rows)
    left = len(content["skipped"]) + sum(bool(row.get("skipped")) for row in rows)
    bad = " ".join(part for part in (str(wrong), content["error"] or "") if part)
    met = f"{sum(aims)} of {len(aims)}" if aims else "-"
    return [str(len(rows)), bad, met if all(aims) else f"{met} {MISSED}", str(left)]


def _rows(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    names = [name for name in COLUMNS if any(row.get(name) is not None for row in rows)]
    if "ms" in names and "us" in names:
        names.remove("us")  # the same
    body = [[row["case"], *(_cell(row, name) for name in names)] for row in rows]
    return table(["case", *(COLUMNS[name] for name in names)], body)


def _cell(row: Mapping[str, Any], name: str) -> str:
    value = row.get(name)
    if value is None:
        return "-"
    if name == "target":
        return f"{value} {MISSED}" if row.get("met") is False else str(value)
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return str(value)
