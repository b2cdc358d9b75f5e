# SPDX-License-Identifier: Apache-2.0
"""`jaxserve run` as users start it, and the commands that talk to it."""

import gzip
import json
import os
import re
import signal
import subprocess
import sysconfig
from collections.abc import Generator
from pathlib import Path

import pytest

from tests.cli.conftest import Command, one_error
from tests.fast import XLA_FLAGS, programs
from tests.server.live import ENGINE, Live, wait, write_model

JAXSERVE = str(Path(sysconfig.get_path("scripts")) / "jaxserve")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("live")


@pytest.fixture(scope="module")
def live(folder: Path) -> Generator[Live]:
    config = {**ENGINE, "compilation_cache_dir": programs(), "profile_dir": str(folder / "traces")}
    (folder / "config.yaml").write_text("".join(f"{name}: {json.dumps(value)}\n" for name, value in config.items()))
    words = [JAXSERVE, "run", str(write_model(folder / "tiny")), "--port", "0", "--config", str(folder / "config.yaml")]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": XLA_FLAGS}
    with (
        (folder / "log").open("wb") as log,
        subprocess.Popen([*words, "--served-model-name", "tiny"], stdout=log, stderr=log, env=environment) as process,
    ):
        server = Live(process, folder / "log")
        try:
            server.wait_listening()
            server.wait_ready()
            yield server
            server.signal(signal.SIGTERM)
            assert server.wait_exit() == 0, server.log
        finally:
            process.kill()


def url(live: Live) -> str:
    return f"http://127.0.0.1:{live.port}/v1"


def test_start(live: Live) -> None:
    first, second = live.log.splitlines()[:2]
    assert re.fullmatch(r"jaxserve [\d.]+  model tiny", first)
    assert second.startswith("settings: model=") and "max_model_len=256" in second and "warmup=none" in second
    wait(lambda: "curl " in live.log)
    assert "is ready" in live.log and "error" not in live.log


def test_talk(live: Live, command: Command) -> None:
    words = ("--url", url(live), "--max-tokens", "5", "--temperature", "0", "--stats")
    said = command("chat", *words, "-q", "the")
    assert said.code == 0 and said.out and re.search(r"\b[1-5] tokens", said.err), said
    assert command("chat", *words, "-q", "the").out == said.out
    said = command("complete", *words, stdin="the")
    assert said.code == 0 and said.out, said
    expected = live.post("/v1/completions", {"prompt": "the", "max_tokens": 5, "temperature": 0}).json
    assert said.out.strip("\n") == expected["choices"][0]["text"].strip("\n")
    one_error(command("chat", *words, "--model-name", "other", "-q", "the"), 1, "other", "--model-name")
    one_error(command("complete", *words, "-q", "the " * 500), 1, "256")


def test_bench(live: Live, command: Command, tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    said = command(
        *("bench", "serve", "--url", url(live), "--num-prompts", "5", "--random-input-len", "7", "--ignore-eos"),
        *("--random-output-len", "6", "--json", file),
    )
    assert said.code == 0, said
    figures = json.loads(file.read_text())
    assert (figures["completed"], figures["failed"]) == (5, 0)
    assert (figures["total_input_tokens"], figures["total_output_tokens"]) == (35, 30)


def test_profile(live: Live, command: Command, folder: Path) -> None:
    said = command("profile", "--url", url(live), "--seconds", "0.1", "--out", folder / "traces")
    assert said.code == 0, said
    trace = Path(said.out.splitlines()[0].rpartition(" ")[2])
    assert json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
