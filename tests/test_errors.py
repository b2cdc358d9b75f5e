# SPDX-License-Identifier: Apache-2.0
"""User errors are one line, whatever they contain, also after crossing processes."""

import pickle

from jaxserve.errors import CheckpointError, JaxserveError, one_line


def test_an_error_is_one_line() -> None:
    error = CheckpointError("bad\nname\x1b[31m \ud800", "rename it")
    assert str(error) == "bad\\nname\\x1b[31m \\ud800; rename it"
    assert isinstance(error, JaxserveError)


def test_one_line_keeps_text_and_cuts_what_is_long() -> None:
    assert one_line("größe 语言 😀 a b") == "größe 语言 😀 a b"
    assert one_line("x" * 300) == "x" * 199 + "…"


def test_an_error_crosses_processes() -> None:
    copy = pickle.loads(pickle.dumps(CheckpointError("a", "b")))
    assert (type(copy), str(copy), copy.hint) == (CheckpointError, "a; b", "b")
