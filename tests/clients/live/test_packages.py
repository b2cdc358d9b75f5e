# SPDX-License-Identifier: Apache-2.0
"""Client packages against `jaxserve run` with the demo model: `make test-clients`, in environments of their own."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path

import pytest

from tests.clients import record
from tests.fast import programs
from tests.server.live import Live

ANSWER = "7 + 5 = 12"
UNSUPPORTED = {"json_schema": 'response_format.type must be "text"', "tools": "tools is not supported yet"}


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Generator[Live]:
    log = tmp_path_factory.mktemp("demo") / "log"
    words = [sys.executable, "-m", "jaxserve", "run", "--port", "0", "--compilation-cache-dir", programs()]
    with (
        log.open("wb") as file,
        subprocess.Popen(words, stdout=file, stderr=file, env={**os.environ, "JAX_PLATFORMS": "cpu"}) as process,
    ):
        server = Live(process, log)
        try:
            server.wait_listening()
            server.wait_ready()
            yield server
            server.signal(signal.SIGTERM)
            assert server.wait_exit() == 0, server.log
        finally:
            process.kill()


def results(name: str, server: Live) -> dict[str, dict[str, str]]:
    if not record.interpreter(name).exists():
        pytest.skip(f"there is no {record.PACKAGES[name]}")
    before = server.log.count(" status=5")
    lines = [*record.shapes(name, f"http://127.0.0.1:{server.port}/v1", "demo")]
    assert "version" in lines[0], lines
    assert server.log.count(" status=5") == before and "Traceback" not in server.log
    return {line["shape"]: line for line in lines[1:]}


@pytest.mark.parametrize("name", ["openai_sdk", "langchain", "litellm_sdk", "openai_agents"])
def test_answers(demo: Live, name: str) -> None:
    """Greedy answers are the same however they are asked for."""
    found = results(name, demo)
    for shape, why in UNSUPPORTED.items():
        assert why in found.pop(shape, {"error": why})["error"].replace("\\", "")
    for shape, line in found.items():
        assert "error" not in line, line
        if shape == "embedding":
            assert line["text"] == "192"
        elif shape.startswith("completion"):
            assert line["text"] == found["completion"]["text"] and line["text"].strip()
        else:
            assert line["text"] == ANSWER, line
    assert len(found) >= 3


def test_lm_eval(demo: Live) -> None:
    found = results("lm_eval_harness", demo)
    assert found["local_completions"].get("text") == "toy_choices:2 toy_texts:2", found
    assert found["local_chat_completions"].get("text") == "toy_texts:2", found


def test_guidellm(demo: Live) -> None:
    found = results("guidellm_benchmark", demo)
    assert {shape: line.get("text") for shape, line in found.items()} == dict.fromkeys(
        ("completions", "chat_completions"), "4"
    ), found


def test_what_they_send_is_what_was_recorded() -> None:
    """Of packages of the same version. `python -m tests.clients.record` renews the files."""
    for name in ("openai_sdk", "litellm_sdk"):
        known = json.loads((Path(record.HERE) / "recorded" / f"{name}.json").read_text())
        if record.interpreter(name).exists():
            made = record.record(name)
            if made["version"] == known["version"]:
                assert made["requests"] == known["requests"]
