# SPDX-License-Identifier: Apache-2.0
"""A wrong option of a benchmark gives one line and exit status 2, before any work."""

import argparse
import importlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import arguments

COUNTS = arguments.some(arguments.whole)


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        (arguments.whole, "3", 3),
        (arguments.whole_or_none, "0", 0),
        (arguments.positive, "0.5", 0.5),
        (COUNTS, "1, 8,32", [1, 8, 32]),
        (arguments.several(arguments.positive), "", []),
        (arguments.url, "https://a.example:8000/v1/", "https://a.example:8000"),
        (arguments.file_to_write, "x.json", Path("x.json")),
        (arguments.python, sys.executable, sys.executable),
    ],
)
def test_what_is_meant(kind: Callable[[str], Any], text: str, value: Any) -> None:
    assert kind(text) == value


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        *((arguments.whole, text) for text in ("0", "-3", "x", "1.5", "")),
        (arguments.whole_or_none, "-1"),
        *((arguments.positive, text) for text in ("0", "-3", "nan", "inf", "x")),
        *((COUNTS, text) for text in ("", ",", "1,1", "1,x", "0")),
        *((arguments.url, text) for text in ("127.0.0.1:8000", "ftp://x", "http://", "x")),
        (arguments.file_to_write, "/nonexistent/x.json"),
        *((arguments.python, text) for text in ("/nonexistent", "/", __file__)),
    ],
)
def test_what_is_refused(kind: Callable[[str], Any], text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError) as found:
        kind(text)
    assert str(found.value)


@pytest.mark.parametrize(
    ("benchmark", "wrong"),
    [
        ("serving", ["--rate", "nan"]),
        ("compare", ["--servers", "vllm"]),
        ("batching", ["--requests", "0"]),
        ("startup", ["--rounds", "0"]),
    ],
)
def test_a_wrong_value_ends_it(
    benchmark: str, wrong: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = importlib.import_module(f"benchmarks.{benchmark}")
    monkeypatch.setattr(sys, "argv", [f"{benchmark}.py", *wrong])
    with pytest.raises(SystemExit) as ended:
        module.main()
    said = capsys.readouterr()
    assert ended.value.code == 2 and not said.out
    assert f"error: argument {wrong[0]}: " in said.err.splitlines()[-1]


def test_a_wrong_value_ends_its_process() -> None:
    command = [sys.executable, "-m", "benchmarks.serving", "--rate", "nan"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 2 and not done.stdout
    assert "error: argument --rate: " in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr


def test_a_load_without_an_answer_fails() -> None:
    command = [sys.executable, "-m", "benchmarks.serving", "--model", "m", "--url", "http://127.0.0.1:9"]
    command += ["--concurrency", "2"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1 and " 8 " in done.stdout and " - " in done.stdout
    assert "2 at once: 8 failed: Cannot connect" in done.stderr
    assert done.stderr.splitlines()[-1] == "error: no request succeeded"
