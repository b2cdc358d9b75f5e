# SPDX-License-Identifier: Apache-2.0
"""The benchmark of the host's work, tiny: that it tells; and that the work stays flat, by calls."""

import json
import sys
from pathlib import Path
from types import FrameType

import pytest

from benchmarks import engine_host
from benchmarks.engine_host import Bench, StepSeconds


def test_it_measures_and_tells(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "rows.json"
    engine_host.main(["--tiny", "--json", str(file)])
    content = json.loads(file.read_text())
    assert [row["rows"] for row in content["rows"]] == [1, 4]
    for row in content["rows"] + content["after"]:
        parts = row["schedule_us"] + row["pack_us"] + row["commit_us"]
        assert 0 < parts < 1.5 * row["step_us"] and row["step_us"] <= row["median_us"] and row["steps"] == 20
    assert content["ratio"] == content["after"][1]["step_us"] / content["after"][0]["step_us"]
    assert {"date", "git", "machine", "processor"} <= content.keys()
    shown = capsys.readouterr().out
    assert f"{content['rows'][1]['step_us']:.1f}" in shown and f"ratio {content['ratio']:.3f}" in shown


def test_a_quarter_of_the_steps_is_as_quick() -> None:
    steps = [StepSeconds(i * 1e-6, 0.0, 0.0, 0.0) for i in range(1, 100)]
    row = engine_host.row_of(5, steps)
    assert (row.step_us, row.median_us, row.row_us) == pytest.approx((25, 50, 5))


def calls(bench: Bench) -> int:
    """Of Python functions and of C, in 32 steps: two blocks for every row."""
    count = 0

    def counted(frame: FrameType, event: str, argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(counted)
    try:
        for _ in range(32):
            bench.step()
    finally:
        sys.setprofile(None)
    return count


def test_work_does_not_grow_with_what_is_over() -> None:
    young, old = (Bench(rows=8, longest=512, seed=1) for _ in range(2))
    old.serve(1000)
    for bench in (young, old):
        bench.fill()
    assert calls(old) <= 1.02 * calls(young)
