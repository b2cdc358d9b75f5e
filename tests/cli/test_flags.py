# SPDX-License-Identifier: Apache-2.0
"""Words to values: every kind of field, every spelling, and what is said of wrong ones."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.errors import UsageError
from jaxserve.flags.help import help_text, topic_help
from jaxserve.flags.parsing import Arg, HelpRequested, Parser, field_docs, flags_of

type Color = Literal["red", "green"]


@dataclass(frozen=True)
class Base:
    max_len: int | None = None
    """How long; see some_share."""


@dataclass(frozen=True)
class Settings(Base):
    place: Annotated[Path | None, Arg(positional=True)] = None
    """Where."""
    some_share: float = 0.5
    """How much."""
    name: Annotated[str, Arg(options=("-n", "--called"))] = "x"
    """What it is called."""
    color: Color = "red"
    """Which."""
    warm: bool = True
    no_ui: bool = False
    keys: tuple[str, ...] = field(default=(), repr=False)
    """Which
    ones."""


PARSER = Parser("prog", flags_of(Settings), about="About.", refused={"--old": ("--old is not supported", "leave it")})


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], {}),
        (["--max-len", "8"], {"max_len": 8}),
        (["--max_len=8"], {"max_len": 8}),
        (["--max-len", "none"], {"max_len": None}),
        (["--max-len", "-1"], {"max_len": -1}),
        (["a/b"], {"place": Path("a/b")}),
        (["--", "-x"], {"place": Path("-x")}),
        (["-"], {"place": Path("-")}),
        (["--some-share", ".25"], {"some_share": 0.25}),
        (["-n", "y"], {"name": "y"}),
        (["--called=--y"], {"name": "--y"}),
        (["--name", "none"], {"name": "none"}),
        (["--color", "green"], {"color": "green"}),
        (["--no-warm", "--no-ui"], {"warm": False, "no_ui": True}),
        (["--warm=false", "--ui"], {"warm": False, "no_ui": False}),
        (["--keys", "a", "b", "--keys", "c", "--keys=d", "--warm"], {"keys": ("a", "b", "c", "d"), "warm": True}),
        (["--max-len", "1", "--max-len", "2"], {"max_len": 2}),
    ],
)
def test_what_is_given(words: list[str], expected: dict[str, Any]) -> None:
    found = PARSER.parse(words)
    assert found == expected
    Settings(**found)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *(("0", 0), ("4k", 4000), ("4K", 4096), ("4Ki", 4096), ("4KiB", 4096), ("1.5k", 1500), ("2M", 2 * 2**20)),
        *(("80GiB", 80 * 2**30), ("80GB", 80 * 10**9), ("80gb", 80 * 10**9), ("0.5G", 2**29), ("1_000", 1000)),
        *(("1m", 10**6), ("8 GiB", 8 * 2**30), ("-3", -3), ("+3", 3)),
    ],
)
def test_whole_numbers(text: str, value: int) -> None:
    assert PARSER.parse([f"--max-len={text}"]) == {"max_len": value}


@given(st.text(max_size=8))
def test_no_text_is_more_than_a_fault(text: str) -> None:
    try:
        found = PARSER.parse([f"--max-len={text}"])["max_len"]
    except UsageError as error:
        assert "--max-len is " in error.problem and "\n" not in str(error)
    else:
        assert found is None or isinstance(found, int)


@given(st.lists(st.sampled_from(["--max-len", "8", "--keys", "-", "--warm", "--no-warm", "--x", "-n", "a", "--", "="])))
def test_no_line_is_more_than_a_fault(words: list[str]) -> None:
    try:
        Settings(**PARSER.parse(words))
    except UsageError as error:
        assert error.problem and error.hint


@pytest.mark.parametrize(
    ("words", "problem", "hint"),
    [
        (["--max-len"], "--max-len needs a value", "--max-len N"),
        (["--max-len", "--warm"], "--max-len needs a value", "--max-len N"),
        (["--max-len", "x"], "--max-len is 'x'", "whole number"),
        (["--max-len", "1.5"], "--max-len is '1.5'", "whole number"),
        (["--max-len", "²"], "--max-len is '²'", "whole number"),
        (["--some-share", "x"], "--some-share is 'x'", "a number"),
        (["--color", "blue"], "--color is 'blue'", "red, green"),
        (["--warm=5"], "--warm is '5'", "true or false"),
        (["--no-warm=true"], "--no-warm takes no value", "--warm=true"),
        (["a", "b"], "'b' is one word too many", "PLACE"),
        (["--max-lne", "5"], "unknown option --max-lne", "did you mean --max-len?"),
        (["--no-wram"], "unknown option --no-wram", "did you mean --no-warm?"),
        (["--xyzzy"], "unknown option --xyzzy", "see prog --help"),
        (["-q"], "unknown option -q", ""),
        (["--old", "x"], "--old is not supported", "leave it"),
        (["--keys"], "--keys needs a value", "--keys TEXT ..."),
    ],
)
def test_what_is_wrong(words: list[str], problem: str, hint: str) -> None:
    with pytest.raises(UsageError) as caught:
        PARSER.parse(words)
    assert caught.value.problem == problem
    assert hint in caught.value.hint


def test_what_must_be_given() -> None:
    @dataclass
    class Needs:
        source: Annotated[str, Arg(positional=True, metavar="SRC")]

    with pytest.raises(UsageError, match="SRC is missing"):
        Parser("prog", flags_of(Needs)).parse([])


def test_values_of_files() -> None:
    flags = {flag.name: flag for flag in PARSER.flags}
    assert flags["max_len"].from_data("4K") == 4096
    assert flags["max_len"].from_data(None) is None
    assert flags["keys"].from_data("a") == ("a",)
    assert flags["keys"].from_data(["a", "b"]) == ("a", "b")
    assert flags["some_share"].from_data(1) == 1
    assert flags["place"].from_data("x") == Path("x")
    for name, value in (("max_len", True), ("max_len", [1]), ("warm", 1), ("name", 5), ("name", None), ("color", "x")):
        with pytest.raises(UsageError, match=name.replace("_", "-")):
            flags[name].from_data(value)


def test_what_is_secret_is_not_shown() -> None:
    with pytest.raises(UsageError) as caught:
        next(flag for flag in PARSER.flags if flag.name == "keys").from_data(123456)
    assert "123456" not in str(caught.value)


def test_docs_of_fields() -> None:
    docs = field_docs(Settings)
    assert docs["max_len"] == "How long; see some_share."
    assert docs["keys"] == "Which ones."
    assert "warm" not in docs


def test_help() -> None:
    with pytest.raises(HelpRequested):
        PARSER.parse(["--help"])
    with pytest.raises(HelpRequested) as caught:
        PARSER.parse(["a", "-h=max-len"])
    text = topic_help(PARSER, caught.value.topic)
    assert "--max-len N" in text and "--color" not in text
    whole = help_text(PARSER)
    assert "usage: prog [PLACE] [options]" in whole and "About." in whole
    assert "-n, --name, --called TEXT" in whole
    assert "--[no-]warm" in whole and "--no-ui" in whole
    assert "see --some-share." in whole  # fields are called by their flags
    assert max(map(len, whole.splitlines())) <= 110
    with pytest.raises(UsageError, match="no help on 'x'"):
        topic_help(PARSER, "x")
