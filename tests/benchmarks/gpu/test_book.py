# SPDX-License-Identifier: Apache-2.0
"""Every section runs with toy shapes, no result is lost, and the command line chooses sections."""

from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import facts
from benchmarks.gpu import book, command
from benchmarks.gpu.sections import SECTIONS
from benchmarks.gpu.times import timing
from tests.benchmarks.gpu.pages import FACTS, Clock, a_page, read, settings, tiny


@pytest.mark.parametrize("section", [section.name for section in SECTIONS])
def test_section_is_complete(section: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tiny(tmp_path, "--section", section) == 0
    page = read(tmp_path, section)
    assert page["complete"] and page["error"] is None and page["skipped"] == []
    assert page["rows"] and all(row.get("ok", True) for row in page["rows"])
    assert page["seed"] == 3 and page["size"] == "tiny" and page["seconds"] > 0
    assert page["machine"].keys() >= {"device", "platform_version", "jax", "jaxlib", "python"}
    assert page["git"].keys() == {"commit", "dirty"}
    printed = capsys.readouterr().out
    assert all(row["case"][:40] in printed for row in page["rows"])
    assert not list(tmp_path.glob("*.partial"))
    if section.startswith("check_"):
        assert all(row["ok"] is True for row in page["rows"])
    if section.startswith("time_"):
        assert (tmp_path / "machine.json").exists(), "ceilings are measured even if machine was not requested"
        # A toy call may be lost in the noise; its row then says so and gives no time.
        assert all((row["us"] or row["noise_us"] <= 0) and row["bytes"] > 0 for row in page["rows"])
    if section == "sweep":
        assert all(row["key"] and row["tried"] > 1 for row in page["rows"])


def test_machine_is_measured_once_per_folder(tmp_path: Path) -> None:
    wanted = [section for section in SECTIONS if section.name == "time_blocks"]
    assert [s.name for s in command.with_ceilings(wanted, tmp_path)] == ["machine", "time_blocks"]
    book.write_json(tmp_path / "machine.json", {"rows": [{"case": "copy", "gbps": 4000.0}]})
    assert command.with_ceilings(wanted, tmp_path) == wanted
    assert timing.Ceilings.load(a_page(tmp_path / "other")) == (None, None)


def section_of(name: str, run: Callable[[book.Page], None], share: float = 1.0) -> book.Section:
    return book.Section(name, "made up", share, ("value",), run)


def one_row(page: book.Page) -> None:
    page.add("a row", value=1.0)


def test_section_that_raises_leaves_the_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def breaks(page: book.Page) -> None:
        one_row(page)
        raise RuntimeError("gone wrong\nat length")

    sections = [section_of("first", one_row), section_of("bad", breaks), section_of("last", one_row)]
    assert book.run(sections, settings(tmp_path), FACTS) == 1
    assert read(tmp_path, "first")["complete"] and read(tmp_path, "last")["complete"]
    bad = read(tmp_path, "bad")
    assert bad["error"] == "RuntimeError: gone wrong" and not bad["complete"] and len(bad["rows"]) == 1
    assert "the section failed: RuntimeError: gone wrong" in capsys.readouterr().out


def test_case_that_raises_is_a_failed_row(tmp_path: Path) -> None:
    page = a_page(tmp_path)
    page.each([0, 1], lambda n: {"value": 1 / n}, name=str)
    assert page.rows[0]["ok"] is False and page.rows[0]["error"].startswith("ZeroDivisionError")
    assert page.rows[1]["value"] == 1 and page.failed == 1


def test_file_is_there_after_every_row(tmp_path: Path) -> None:
    page = a_page(tmp_path)
    seen: list[tuple[int, bool]] = []

    def measure(_: int) -> book.Row:
        now = read(tmp_path, "machine")
        seen.append((len(now["rows"]), now["complete"]))
        return {"value": float("nan")}

    page.each([0, 1, 2], measure, name=str)
    assert seen == [(0, False), (1, False), (2, False)]
    assert read(tmp_path, "machine")["rows"][0]["value"] == "nan"


def test_budget_cut_is_recorded(tmp_path: Path, clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    def slow(page: book.Page) -> None:
        page.each("abc", lambda _: clock.pass_(12) or {"value": 1.0}, name=str)

    sections = [section_of("slow", slow), section_of("later", slow, share=3.0)]
    assert book.run(sections, settings(tmp_path, seconds=40.0), FACTS) == 0
    first, second = read(tmp_path, "slow"), read(tmp_path, "later")
    assert [row["case"] for row in first["rows"]] == ["a"] and first["skipped"] == ["b", "c"]
    assert second["complete"], "a section has its own share"
    assert first["seconds"] == 12 and not first["complete"]
    assert "out of time, skipped 2: b, c" in capsys.readouterr().out


@pytest.mark.parametrize("seconds", ["nan", "-1"])
def test_seconds_must_make_sense(tmp_path: Path, seconds: str) -> None:
    with pytest.raises(SystemExit) as ended:
        tiny(tmp_path, "--seconds", seconds)
    assert ended.value.code == 2


def test_a_folder_that_cannot_be_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert tiny(tmp_path / "file" / "out") == 1
    assert capsys.readouterr().out.startswith("error: cannot create the results folder")


def test_no_time_at_all(tmp_path: Path) -> None:
    assert tiny(tmp_path, "--section", "check_blocks", "time_decode", "--seconds", "0") == 0
    assert read(tmp_path, "check_blocks")["skipped"] and read(tmp_path, "time_decode")["rows"] == []


def test_full_size_needs_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--out", str(tmp_path)]) == 1
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1 and "--size tiny" in printed and not list(tmp_path.iterdir())


def test_sections_by_name_and_by_beginning(capsys: pytest.CaptureFixture[str]) -> None:
    made = command.parser()
    names = [s.name for s in command.chosen(["time", "check_mla"], made)]
    assert names == ["check_mla", *(s.name for s in SECTIONS if s.name.startswith("time_"))]
    with pytest.raises(SystemExit):
        command.chosen(["nothing"], made)
    assert command.main(["--list"]) == 0
    listed = capsys.readouterr().out
    assert all(section.name in listed for section in SECTIONS)


def test_results_name_the_device_and_no_more() -> None:
    assert facts.default_out(tiny=True).name.endswith("-cpu-tiny")
    assert facts.git().keys() == {"commit", "dirty"}
