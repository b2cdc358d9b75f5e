# SPDX-License-Identifier: Apache-2.0
"""Fixtures for commands: the command in this process, a tiny model, what `run` would serve, and a fake server."""

import io
import shutil
import sys
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from jaxserve import cli
from jaxserve.config import EngineConfig
from jaxserve.server import lifecycle
from jaxserve.server.config import ServerConfig
from tests.cli.fake_server import FakeServer, running
from tests.golden import load as golden


class Said(NamedTuple):
    code: int
    out: str
    err: str


type Command = Callable[..., Said]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """Run `jaxserve` with these arguments and this standard input."""
    for name in ("JAXSERVE_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)

    def run(*words: str | Path, stdin: str = "") -> Said:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode())))
        capsys.readouterr()
        try:
            code = cli.main([str(word) for word in words])
        except SystemExit as end:
            code = int(end.code or 0)
        said = capsys.readouterr()
        return Said(code, said.out, said.err)

    return run


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = golden.write_checkpoint("llama-gqa-tied", tmp_path_factory.mktemp("models") / "tiny")
    shutil.copytree(golden.TOKENIZERS / "byte-level", folder, dirs_exist_ok=True)
    return folder


class Served:
    def __init__(self) -> None:
        self.engine: Any = None
        self.server: Any = None

    def __call__(self, engine: EngineConfig, server: ServerConfig) -> int:
        self.engine, self.server = engine, server
        return 7


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Served:
    """What `run` would serve."""
    served = Served()
    monkeypatch.setattr(lifecycle, "serve", served)
    return served


@pytest.fixture
def server() -> Generator[FakeServer]:
    with running(FakeServer()) as fake:
        yield fake


def one_error(said: Said, code: int, *parts: str) -> None:
    """Check that the only output is one error of the usual form."""
    assert (said.code, said.out) == (code, ""), said
    assert said.err.startswith("error: ") and said.err.count("\n") == 1 and said.err.count("  hint: ") == 1, said.err
    for part in parts:
        assert part in said.err, said.err
