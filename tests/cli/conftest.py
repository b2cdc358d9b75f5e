# SPDX-License-Identifier: Apache-2.0
"""Fixtures for commands: the command in this process, and a fake server."""

import io
import sys
from collections.abc import Callable, Generator
from pathlib import Path
from typing import NamedTuple

import pytest

from jaxserve import cli
from tests.cli.fake_server import FakeServer, running


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
