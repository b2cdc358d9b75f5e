# SPDX-License-Identifier: Apache-2.0
"""Every command in a README is run here or known to be run elsewhere; a new command fails until it is either.

The server is `jaxserve run` with the demo model, as a reader would start it, but on a free port and with few shapes.
Commands that need no server run in this process; a fresh one would spend most of its time importing jax.
"""

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sysconfig
import time
import urllib.error
import urllib.request
from collections.abc import Generator
from pathlib import Path

import pytest

from jaxserve import cli, demo
from tests import readmes
from tests.fast import XLA_FLAGS, programs

ROOT = Path(__file__).parents[1]
SCRIPTS = Path(sysconfig.get_path("scripts"))
FEW = ["--max-num-seqs", "1", "--max-num-batched-tokens", "16", "--max-model-len", "256", "--no-warmup"]
ENVIRONMENT = os.environ | {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": XLA_FLAGS,
    "PATH": f"{SCRIPTS}{os.pathsep}{os.environ['PATH']}",
}


def commands() -> list[str]:
    """The commands of all READMEs, without repetition."""
    return list(dict.fromkeys(command for name in readmes.READMES for command in readmes.commands(name)))


# Commands that other tests or CI run: how they begin, and where they are run.
ELSEWHERE = {
    "make": "test_targets_are_there",
    "pip install": ".ci/run installs the wheel",
    "docker build": "tests/deploy",
    "docker run": "tests/deploy, which runs what the image would",
    ".ci/run": "CI itself",
    "python -m pytest": "the suite itself, and test_paths_of_tests_are_there",
    "python -m benchmarks": "tests/benchmarks",
    "jaxserve run": "the fixture here",
    "jaxserve profile MODEL": "tests/cli/test_profile.py",
    "jaxserve check MODEL": "test_check_in_a_fresh_process",
}
# A command as a README has it, and what is run for it. {url} is the server's, {demo} the demo model's folder.
OFFLINE = {
    "jaxserve version [--json]": "jaxserve version --json",
    "jaxserve devices [--json]": "jaxserve devices --json",
    "jaxserve inspect PATH [--json]": "jaxserve inspect {demo} --json",
    "jaxserve convert SRC DST [--revision R] [--dtype bfloat16] [--offline] [--overwrite]": (
        "jaxserve convert {demo} converted --dtype bfloat16 --offline --overwrite"
    ),
    "jaxserve convert SRC DST --quantize int4": "jaxserve convert {demo} quantized --quantize int4 --offline",
    "jaxserve convert SRC DST --quantize awq --calibration text.jsonl": "jaxserve convert --help",  # test_calibrated.py
    "jaxserve completion bash|zsh|fish": "jaxserve completion bash",
    "jaxserve bench throughput|latency": "jaxserve bench throughput --help",  # tests/cli/test_bench.py runs them
}
ONLINE = {
    "jaxserve complete [-q TEXT]": "jaxserve complete --url {url} -q Once",
    "jaxserve bench serve": (
        "jaxserve bench serve --url {url} --num-prompts 3 --random-input-len 8 --random-output-len 4"
    ),
}


@pytest.fixture(scope="module")
def traces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("traces")


@pytest.fixture(scope="module")
def port(traces: Path) -> Generator[int]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        free = int(probe.getsockname()[1])
    command = [SCRIPTS / "jaxserve", "run", f"--port={free}", f"--profile-dir={traces}", *FEW]
    process = subprocess.Popen(
        [*command, f"--compilation-cache-dir={programs()}"], env=ENVIRONMENT, stderr=subprocess.PIPE, text=True
    )
    try:
        until = time.monotonic() + 100
        while not _healthy(free):
            assert process.poll() is None and time.monotonic() < until, process.stderr and process.stderr.read()
            time.sleep(0.1)
        yield free
    finally:
        process.terminate()
        _, said = process.communicate(timeout=30)
    assert process.returncode == 0, said
    # The Ready block is the last that a start says, and its curl is one that works.
    assert re.search(rf"curl http://127\.0\.0\.1:{free}/v1/chat/completions", said), said


def _healthy(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
            return answer.status == 200
    except (OSError, urllib.error.URLError):
        return False


def run(command: str, cwd: Path) -> str:
    done = subprocess.run(
        shlex.split(command), cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_every_command_is_run_somewhere() -> None:
    known = [*OFFLINE, *ONLINE]
    literal = ("curl ", "jaxserve chat -q", "jaxserve profile --url")  # run as they stand, below
    found = commands()
    assert len(found) > 30
    unknown = [command for command in found if command not in known and not command.startswith((*ELSEWHERE, *literal))]
    assert unknown == []
    assert [command for command in known if command not in found] == [], "no longer in a README"


@pytest.mark.parametrize("command", OFFLINE)
def test_commands_without_a_server(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line = OFFLINE[command].format(demo=demo.FOLDER)
    monkeypatch.chdir(tmp_path)
    name, *words = shlex.split(line)
    assert name == "jaxserve"
    try:
        code = cli.main(words)
    except SystemExit as end:  # --help
        code = end.code
    said = capsys.readouterr()
    assert code == 0, f"{line}\n{said.out}\n{said.err}"
    assert said.out


def test_check_in_a_fresh_process(tmp_path: Path) -> None:
    """`jaxserve check` in a process where it sets up jax's devices itself."""
    assert run(f"jaxserve check {demo.FOLDER} --memory 1GiB", tmp_path)


@pytest.mark.parametrize("command", ONLINE)
def test_commands_at_a_server(command: str, port: int, traces: Path, tmp_path: Path) -> None:
    assert run(ONLINE[command].format(url=f"http://127.0.0.1:{port}", traces=traces), tmp_path)


def test_commands_that_are_run_as_they_are(port: int, traces: Path, tmp_path: Path) -> None:
    """Except for the port, and the folder that the server may write to."""
    for command in commands():
        here = command.replace("127.0.0.1:8000", f"127.0.0.1:{port}")
        if command.startswith("curl "):
            if shutil.which("curl") is None:
                continue
            answer = json.loads(run(here, tmp_path))
            assert answer["choices"][0]["message"]["content"]
        elif command.startswith("jaxserve chat -q"):
            assert run(here.replace("chat ", f"chat --url http://127.0.0.1:{port} "), tmp_path).strip()
        elif command.startswith("jaxserve profile --url"):
            run(here.replace("--out DIR", f"--out {traces}").replace("--seconds 5", "--seconds 0.2"), tmp_path)
            assert list(traces.rglob("*.xplane.pb"))


def test_the_example_of_a_client_runs(port: int, capsys: pytest.CaptureFixture[str]) -> None:
    [example] = [each for each in readmes.examples("README.md") if "openai" in each]
    exec(compile(example.replace(":8000", f":{port}"), "README.md", "exec"), {})
    assert capsys.readouterr().out.strip()


def test_targets_are_there() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {command.split()[1] for command in commands() if command.startswith("make ")} <= targets


def test_benchmarks_are_there() -> None:
    for command in commands():
        if command.startswith("python -m benchmarks"):
            path = ROOT.joinpath(*command.split()[2].split("."))
            assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), command


def test_paths_of_tests_are_there() -> None:
    words = [word for command in commands() if command.startswith("python -m pytest") for word in command.split()]
    assert all((ROOT / word).exists() for word in words if word.startswith("tests/"))
