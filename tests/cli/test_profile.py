# SPDX-License-Identifier: Apache-2.0
"""`jaxserve profile` of a server, and offline: traces that Perfetto can read."""

import gzip
import json
from pathlib import Path

from tests.cli.conftest import Command, one_error
from tests.cli.fake_server import FakeServer
from tests.cli.test_bench import SMALL
from tests.golden import load as golden


def test_a_server(command: Command, server: FakeServer, tmp_path: Path) -> None:
    words = ("profile", "--url", server.url, "--seconds", "0.05", "--out", tmp_path)
    one_error(command(*words), 1, "no trace appeared", "--profile-dir")
    assert [path for path, _ in server.asked] == ["/start_profile", "/stop_profile"]
    name = server.bodies("/start_profile")[0]["folder"]
    assert "/" not in name
    server.faults["/start_profile"] = 403
    one_error(command(*words), 1, "replied")
    assert len(server.bodies("/stop_profile")) == 1


def test_without_a_server(command: Command, tmp_path: Path) -> None:
    model = golden.write_checkpoint("llama-gqa-tied", tmp_path / "tiny")
    out = tmp_path / "traces"
    said = command(
        "profile", model, "--out", out, *SMALL, "--num-prompts", "2", "--input-len", "4", "--output-len", "4"
    )
    assert said.code == 0, said
    [line, logdir] = said.out.splitlines()
    trace = Path(line.rpartition(" ")[2])
    assert trace.is_relative_to(out) and logdir.endswith(f"--logdir {out}")
    names = {event.get("name") for event in json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]}
    assert "step" in names
    assert list(out.rglob("*.xplane.pb"))


def test_wrong_use(command: Command) -> None:
    one_error(command("profile", "--seconds", "1"), 2, "--out is missing")
    one_error(command("profile", "m", "--url", "x", "--out", "y"), 2, "--url and a model")
    one_error(command("profile", "--out", "y", "--max-model-len", "5"), 2, "--max-model-len requires a model")
    one_error(command("profile", "--out", "y", "--seconds", "0"), 2, "--seconds is 0")
