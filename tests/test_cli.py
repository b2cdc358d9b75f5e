# SPDX-License-Identifier: Apache-2.0
"""The command as users run it: another process, its output, its exit code."""

import json
import os
import subprocess
import sys
import sysconfig
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxserve import __version__, cli
from jaxserve.cli.version import PACKAGES, Version

COMMAND = Path(sysconfig.get_path("scripts")) / "jaxserve"


def jaxserve(*args: str | Path, **env: str) -> subprocess.CompletedProcess[str]:
    command = [str(COMMAND), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, env={**os.environ, **env})


def done(*args: str | Path, **env: str) -> str:
    result = jaxserve(*args, **env)
    assert (result.returncode, result.stderr) == (0, "")
    return result.stdout


def user_error(*args: str | Path, **env: str) -> str:
    """The command's error line: one line, on stderr, exit code 1, nothing on stdout."""
    result = jaxserve(*args, **env)
    assert (result.returncode, result.stdout) == (1, ""), result
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    return result.stderr.strip()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    tensors = {"w": np.zeros((2, 3), np.float16), "b": np.zeros(3, np.float32), "s": np.float32(1)}
    save_file({k: np.asarray(v) for k, v in tensors.items()}, tmp_path / "model.safetensors")
    return tmp_path


@pytest.mark.parametrize("args", [[], ["version"], ["devices"], ["inspect"], ["run"], ["check"], ["bench", "latency"]])
def test_help_imports_nothing_heavy(args: list[str]) -> None:
    script = (
        "import sys\n"
        "from jaxserve.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit as end: assert end.code == 0, end.code\n"
        "else: raise AssertionError('help did not exit')\n"
        "heavy = {'jax', 'jaxlib', 'flax', 'transformers', 'numpy', 'aiohttp', 'pallas_kernels', 'pydantic', 'yaml'}\n"
        "assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()\n"
    )
    command = [sys.executable, "-c", script, *args, "--help"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert result.returncode == 0, result.stderr
    assert "usage: jaxserve" in result.stdout


def test_a_bare_command_prints_its_help() -> None:
    assert done() == done("--help")
    assert done("bench") == done("bench", "--help") and "bench serve" in done("bench")


def test_help_names_every_command() -> None:
    text = done("--help")
    assert all(name in text for name in ("version", "devices", "inspect"))


def test_version() -> None:
    versions = json.loads(done("version", "--json"))
    assert versions.pop("jaxserve") == __version__ == metadata.version("jaxserve")
    assert versions.pop("python") == sys.version.split()[0]
    assert versions == {name: metadata.version(name) for name in PACKAGES}
    assert f"jaxserve           {__version__}\n" in done("version")


def test_python_runs_the_package_too() -> None:
    command = [sys.executable, "-m", "jaxserve", "version"]
    assert subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout == done("version")


def test_exit_codes_of_the_package(tmp_path: Path) -> None:
    for words, code in ((("check", str(tmp_path / "absent")), 1), (("check", "--no-such-flag"), 2)):
        command = [sys.executable, "-m", "jaxserve", *words]
        assert subprocess.run(command, capture_output=True, timeout=60).returncode == code


def test_version_lists_what_is_required() -> None:
    required = metadata.requires("jaxserve") or []
    names = {line.split(";")[0].split(">")[0].split("<")[0] for line in required if ";" not in line}
    assert names == set(PACKAGES)


def test_devices() -> None:
    found = json.loads(done("devices", "--json", JAX_PLATFORMS="cpu"))
    assert found["kernels"] == "cpu"
    assert [device["platform"] for device in found["devices"]] == ["cpu"]
    assert done("devices", JAX_PLATFORMS="cpu").endswith("kernels: cpu\n")


def test_devices_on_an_absent_platform() -> None:
    for platform in ("nonsense", "cuda"):  # unknown; known, and its plugin not installed here
        message = user_error("devices", JAX_PLATFORMS=platform)
        assert message.endswith("  hint: check JAX_PLATFORMS") and "()" not in message


@pytest.mark.parametrize("name", ["", "model.safetensors"])
def test_inspect(model: Path, name: str) -> None:
    found = json.loads(done("inspect", model / name, "--json"))
    assert found["bytes"] == 28
    assert found["parameters"] == {"F16": 6, "F32": 4}
    rows = {row.pop("name"): row for row in found["tensors"]}
    assert rows["w"] == {"dtype": "F16", "shape": [2, 3], "bytes": 12, "file": "model.safetensors"}
    assert rows["s"]["shape"] == []
    table = done("inspect", model / name).splitlines()
    assert [line.split() for line in table if line.startswith("w ")] == [["w", "F16", "2x3", "12", "model.safetensors"]]
    assert table[-2:] == ["3 tensors in 1 file, 28 bytes", "parameters: 6 F16, 4 F32"]


def test_inspect_shows_strange_names_in_any_terminal(tmp_path: Path) -> None:
    save_file({"größe\x1b[2J\n": np.zeros(1, np.float32)}, tmp_path / "model.safetensors")
    assert "größe\\x1b[2J\\n " in done("inspect", tmp_path, PYTHONUTF8="1")
    assert "gr\\xf6\\xdfe\\x1b[2J\\n " in done("inspect", tmp_path, PYTHONIOENCODING="ascii")


def test_inspect_of_a_missing_file(tmp_path: Path) -> None:
    assert "no such file" in user_error("inspect", tmp_path / "absent")
    assert "contains no safetensors checkpoint" in user_error("inspect", tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"junk")
    assert "is too short" in user_error("inspect", tmp_path)


@pytest.mark.parametrize(
    ("args", "complaint"),
    [
        (["inspcet", "x"], "inspect"),
        (["inspect"], "PATH"),
        (["inspect", "x", "--jsom"], "--json"),
        (["version", "extra"], "extra"),
    ],
)
def test_wrong_usage(args: list[str], complaint: str) -> None:
    result = jaxserve(*args)
    assert (result.returncode, result.stdout) == (2, "")
    assert complaint in result.stderr
    assert "Traceback" not in result.stderr


def test_reader_that_leaves_early(tmp_path: Path) -> None:
    tensors = {f"t{i}": np.zeros(1, np.float32) for i in range(5000)}  # more than a pipe holds
    save_file(tensors, tmp_path / "model.safetensors")
    command = [str(COMMAND), "inspect", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout and process.stderr
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


def test_ctrl_c(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(_: Version) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Version, "run", interrupted)
    assert cli.main(["version"]) == 130
    assert capsys.readouterr() == ("", "")
