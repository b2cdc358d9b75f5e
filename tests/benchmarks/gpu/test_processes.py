# SPDX-License-Identifier: Apache-2.0
"""Sections run in the processes that they need."""

import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import book, children, processes
from benchmarks.gpu.sections import SECTIONS


def section(name: str) -> book.Section:
    return next(section for section in SECTIONS if section.name == name)


def test_sections_that_share_an_engine_share_a_process() -> None:
    found = {section.name: processes.process_of(section) for section in SECTIONS}
    assert found["check_paged"] == found["machine"] == "kernels"
    assert found["engine_decode"] == found["engine_gap"] == found["engine_offline"] == "engine"
    assert found["engine_start"] == found["engine_flags"] == found["engine_peer"] == "here"
    assert not processes.needed([section("machine"), section("sweep")]) and processes.needed([section("engine_peer")])
    names = [section.name for section in SECTIONS if section.name.startswith("engine_")]
    assert sorted(names, key=lambda name: found[name]) == names, "each process starts once"


def test_separate_processes(tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setenv(children.PREALLOCATE, "false")  # as keep_small leaves it
    given = book.Settings(out=tmp_path, tiny=True, seed=3, seconds=60.0, table=None)
    facts = {"machine": {"device": "none"}}
    assert processes.run([section("check_blocks"), section("engine_peer")], given, facts) == 0
    assert book.read_rows(tmp_path / "check_blocks.json") and book.read_rows(tmp_path / "engine_peer.json")
    printed = capfd.readouterr().out
    assert "in a separate process: check_blocks" in printed and "engine_peer" in printed.split("all processes")[1]


def test_a_process_that_dies_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    given = book.Settings(out=tmp_path, tiny=True, seed=3, seconds=60.0, table=None)
    assert processes.run([section("check_blocks")], given, {}) == 1
