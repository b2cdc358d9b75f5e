# SPDX-License-Identifier: Apache-2.0
"""Unusual command lines: empty names, odd addresses, repeated keys, unwritable files. Each gives one error."""

import subprocess
import sysconfig
from pathlib import Path

import pytest

from tests.cli.conftest import Command, one_error

JAXSERVE = Path(sysconfig.get_path("scripts"), "jaxserve")


@pytest.mark.parametrize(
    "words",
    [
        ("run", ""),
        ("run", "--model="),
        ("check", ""),
        ("bench", "throughput", "--model", ""),
        ("profile", "", "--out", "traces"),
    ],
)
def test_an_empty_name_does_not_mean_the_demo(command: Command, words: tuple[str, ...]) -> None:
    one_error(command(*words), 2, "--model is empty")


@pytest.mark.parametrize("url", ["http://[::1", "http://[x]:80", "http://h:99999", "ftp://h"])
def test_invalid_addresses(command: Command, url: str) -> None:
    one_error(command("chat", "--url", url, "-q", "hi"), 2, "is not a server URL")
    one_error(command("bench", "serve", "--url", url), 2, "is not a server URL")


@pytest.mark.parametrize(
    ("words", "reported"),
    [
        (("--timeout", "inf"), "--timeout is inf"),
        (("--request-rate", "1e-320"), "--request-rate is 1e-320"),
        (("--json", "none/there.json"), "cannot write to none/there.json"),
        (("--save-result", "--result-dir", "none"), "no such folder: none"),
    ],
)
def test_impossible_loads(command: Command, words: tuple[str, ...], reported: str) -> None:
    one_error(command("bench", "serve", *words), 2, reported)


def test_the_output_file_is_checked_before_measuring(command: Command) -> None:
    one_error(command("bench", "latency", "--json", "none/there.json"), 2, "cannot write to none/there.json")


@pytest.mark.parametrize(
    ("text", "reported"),
    [
        ("port: 1\nport: 2\n", "port is given twice"),
        ('port: !!int ""\n', "is not valid YAML"),
        ('model: ""\n', "--model is empty"),
        ("allowed-origins: '[\"https://x\"]'\n", "--allowed-origins has an entry that is a JSON list"),
    ],
)
def test_configurations(command: Command, tmp_path: Path, text: str, reported: str) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(text)
    one_error(command("run", "--config", file), 2, reported)


def test_check_rejects_what_run_rejects(command: Command) -> None:
    one_error(command("check", "--max-num-batched-tokens", "16"), 2, "--max-num-batched-tokens is 16")
    one_error(command("check", "--max-model-len", "999999"), 2, "--max-model-len is 999999")
    one_error(command("check", "--memory", "-5"), 2, "--memory is -5")


@pytest.mark.parametrize("topic", ["-tp", "num-gpu-blocks-override", "no-warmup", "max_model_len", "--max-model-len"])
def test_help_on_a_flag_by_any_of_its_names(command: Command, topic: str) -> None:
    said = command("run", f"--help={topic}")
    assert said.code == 0 and "usage: jaxserve run" in said.out


def test_values_that_begin_with_a_dash(command: Command) -> None:
    one_error(command("chat", "-q", "- hi"), 2, "-q needs a value", "use -q TEXT, or -q=VALUE if it begins with a dash")


def test_without_an_output(tmp_path: Path) -> None:
    done = subprocess.run(["sh", "-c", f"{JAXSERVE} version >&-"], capture_output=True, text=True, cwd=tmp_path)
    assert "bug in jaxserve" not in done.stderr
