# SPDX-License-Identifier: Apache-2.0
"""--log-format json: every line on standard error is JSON, from the first to the last, of both processes."""

import io
import json
import logging
import os
import subprocess
import sys
import traceback
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from jaxserve.frontend import log_lines
from tests.server import live as living


def parsed(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


@contextmanager
def written() -> Generator[io.StringIO]:
    """What is written to standard error as JSON."""
    with pytest.MonkeyPatch.context() as patch:
        raw = io.StringIO()
        patch.setattr(sys, "stderr", raw)
        patch.setattr(warnings, "showwarning", warnings.showwarning)
        patch.setattr(logging.getLogger(), "handlers", [])
        log_lines.write_json(["sk-secret"])
        yield raw


def test_prints_are_lines_with_a_level_and_secrets_are_masked() -> None:
    with written() as stream:
        print("one\n\ntwo, sk-secret", file=sys.stderr)
        print("error: three  hint: four", file=sys.stderr)
        print("a part", end="", file=sys.stderr)
        print(" and its end", file=sys.stderr)
        found = [(line["level"], line["message"]) for line in parsed(stream.getvalue())]
        assert found == [
            ("info", "one"),
            ("info", "two, ***"),
            ("error", "error: three  hint: four"),
            ("info", "a part and its end"),
        ]


def test_a_traceback_is_one_line() -> None:
    with written() as stream:
        try:
            raise ValueError("wrong")
        except ValueError:
            traceback.print_exc()
        [line] = parsed(stream.getvalue())
        assert (line["level"], line["message"]) == ("error", "ValueError: wrong")
        assert line["exception"].startswith("Traceback") and "test_json_log.py" in line["exception"]


def test_warnings_and_logs_of_libraries() -> None:
    with written() as stream:
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning("old", DeprecationWarning, "a.py", 7)
        logging.getLogger("some.library").warning("hot")
        first, second = parsed(stream.getvalue())
        assert (first["level"], first["message"], first["where"]) == ("warning", "old", "a.py:7")
        assert (second["level"], second["message"]) == ("warning", "hot")


def test_numbers_have_no_meaningless_digits() -> None:
    with written() as stream:
        record = logging.LogRecord("x", logging.INFO, "", 0, "m", None, None)
        record.fields = {"seconds": 0.12345678901234, "count": 12345678}
        logging.getLogger().handle(record)
    assert '"seconds": 0.123457, "count": 12345678' in stream.getvalue()


def test_what_is_left_at_the_end_is_flushed() -> None:
    with written() as stream:
        sys.stderr.write("Traceback (most recent call last):\n  File x\nno newline")
        sys.stderr.flush()
        assert [line["message"] for line in parsed(stream.getvalue())] == ["no newline"]


def test_every_line_of_a_server_is_json(tmp_path: Path) -> None:
    with living.started(tmp_path, fake="noise", server={"log_format": "json"}) as server:
        living.wait(lambda: "listening on" in server.log)
        server.port = int(server.log.split("http://127.0.0.1:")[1].split(",")[0])
        server.wait_ready()
        server.post("/v1/completions", {"prompt": [1], "max_tokens": 1})
        server.process.terminate()
        assert server.wait_exit(20) == 0
        found = {line["message"]: line for line in parsed(server.log)}
    assert found["of the engine's process"]["category"] == "UserWarning"
    assert found["a library's log of the engine's process"]["level"] == "warning"
    assert "in _make_noise" in found["ValueError: caught"]["exception"]
    assert {"ready", "shutting down", "POST /v1/completions"} <= found.keys()


def test_the_first_lines_and_an_error_at_the_start_are_json(tmp_path: Path) -> None:
    words = ["run", "--log-format", "json", "--model", str(tmp_path), "--port", "0", "--enable-chunked-prefill"]
    command = [sys.executable, "-m", "jaxserve", *words]
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=env)
    lines = parsed(done.stderr)
    assert done.returncode == 1 and lines[-1]["level"] == "error" and "hint" in lines[-1]["message"]
