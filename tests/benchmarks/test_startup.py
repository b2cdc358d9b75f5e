# SPDX-License-Identifier: Apache-2.0
"""How the start-up benchmark tells phases apart; what a start takes is no test."""

from pathlib import Path

import pytest

from benchmarks import startup
from benchmarks.startup import StartTimes


@pytest.mark.parametrize(
    ("said", "phase"),
    [
        (None, "port"),
        ("starting", "jax"),
        ("opening the model", "jax"),
        ("loading 35 %", "load"),
        ("compiling 7/18", "compile"),
        ("", "rest"),
    ],
)
def test_phases(said: str | None, phase: str) -> None:
    assert startup.phase_of(said) == phase and phase in startup.PHASES


def test_the_table_has_medians() -> None:
    starts = [StartTimes(dict.fromkeys(startup.PHASES, seconds), 9 * seconds) for seconds in (1.0, 3.0, 2.0)]
    shown = startup.table({"cold": starts, "warm": starts[:1]}).splitlines()
    assert shown[1].split() == ["cold", "10.00", *["2.00"] * 5, "18.00"]
    assert shown[2].split() == ["warm", "5.00", *["1.00"] * 5, "9.00"]


def test_a_server_that_does_not_start_is_reported(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"the server ended with code 1: error: folder .* does not exist"):
        startup.once(tmp_path / "none", tmp_path, [])
