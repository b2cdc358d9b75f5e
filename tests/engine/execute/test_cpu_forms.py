# SPDX-License-Identifier: Apache-2.0
"""The rules of products on this machine: measured once, kept in a file, the same for all processes."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from jaxserve.engine.execute import cpu_forms, program_store
from pallas_kernels.on_cpu import matmul
from pallas_kernels.on_cpu.matmul import Forms
from tests.models import tiny

SPEC = replace(tiny.model(tiny.block(tiny.grouped(), tiny.MLP)), dtype="bfloat16")


@pytest.fixture(autouse=True)
def measured(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The dtypes that are measured, in place of measuring them."""
    calls: list[str] = []

    def measure(name: str) -> int:
        calls.append(name)
        return 8 if name == "bfloat16" else 64

    monkeypatch.setattr(matmul, "measure", measure)
    before = matmul.forms()
    yield calls
    matmul.use_forms(before)


def test_the_first_start_measures_and_later_ones_read(tmp_path: Path, measured: list[str]) -> None:
    cpu_forms.prepare(tmp_path, SPEC)
    assert matmul.forms().bfloat16 == 8 and measured == ["bfloat16"]
    matmul.use_forms(Forms())
    cpu_forms.prepare(tmp_path, SPEC)
    assert matmul.forms().bfloat16 == 8 and measured == ["bfloat16"]
    cpu_forms.prepare(tmp_path, replace(SPEC, dtype="float32"))
    assert matmul.forms() == Forms(float32=64, bfloat16=8) and measured == ["bfloat16", "float32"]


def test_the_process_that_wrote_first_decides(
    tmp_path: Path, measured: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def slower(name: str) -> int:
        cpu_forms.place_of(tmp_path, name).write_text("4")
        return 16

    monkeypatch.setattr(matmul, "measure", slower)
    cpu_forms.prepare(tmp_path, SPEC)
    assert matmul.forms().bfloat16 == 4
    assert [file.name for file in tmp_path.iterdir()] == [cpu_forms.place_of(tmp_path, "bfloat16").name]


@pytest.mark.parametrize("content", ["", "many", "-3", "9" * 30])
def test_a_broken_file_is_replaced(tmp_path: Path, measured: list[str], content: str) -> None:
    place = cpu_forms.place_of(tmp_path, "bfloat16")
    place.write_text(content)
    cpu_forms.prepare(tmp_path, SPEC)
    assert matmul.forms().bfloat16 == 8 and place.read_text() == "8"


def test_tuning_measures_again(tmp_path: Path, measured: list[str]) -> None:
    cpu_forms.place_of(tmp_path, "int8").write_text("2")
    assert cpu_forms.tune(tmp_path, measured.append) == Forms(float32=64, bfloat16=8, int8=64)
    assert [name for name in measured if name in matmul.MEASURED] == list(matmul.MEASURED)
    assert cpu_forms.place_of(tmp_path, "int8").read_text() == "64"


def test_a_folder_that_cannot_be_written_does_no_harm(tmp_path: Path, measured: list[str]) -> None:
    cpu_forms.prepare(tmp_path / "absent", SPEC)
    assert matmul.forms().bfloat16 == 8


def test_programs_made_by_other_rules_are_others() -> None:
    before = program_store.environment()
    matmul.use_forms(Forms(float32=7))
    assert program_store.environment() != before
