# SPDX-License-Identifier: Apache-2.0
"""From arguments to values: every kind of field, every spelling, and the errors for wrong ones."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.cli import parser_of
from jaxserve.config import ConfigError, EngineConfig
from jaxserve.errors import UsageError
from jaxserve.flags import reference, values
from jaxserve.flags.help import help_text
from jaxserve.flags.parser import HelpRequested, Parser
from jaxserve.flags.setting import Setting, build, flags_of
from jaxserve.server.config import ServerConfig

type Color = Literal["red", "green"]
type Depth = Literal["whole", "half", "none"]


@dataclass(frozen=True)
class Base:
    max_len: Annotated[int | None, Setting("How long; see some_share.")] = None


@dataclass(frozen=True)
class Settings(Base):
    place: Annotated[Path | None, Setting("Where.", given_as="word")] = None
    some_share: Annotated[float, Setting("How much.")] = 0.5
    name: Annotated[str, Setting("What it is called.", spellings=("-n", "--called"))] = "x"
    color: Annotated[Color, Setting("Which.", "Looks")] = "red"
    warm: Annotated[bool, Setting("Whether.")] = True
    no_ui: Annotated[bool, Setting("Whether not.")] = False
    depth: Annotated[Depth, Setting("How far.", yes_no=("whole", "none"))] = "half"
    keys: Annotated[tuple[str, ...], Setting("Which ones.")] = field(default=(), repr=False)
    computed: int = 0  # not a flag


PARSER = Parser("prog", flags_of(Settings), about="About.")


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
        (["--depth", "half"], {"depth": "half"}),
        (["--no-depth"], {"depth": "none"}),
        (["--depth=on"], {"depth": "whole"}),
        (["--keys", "a", "b", "--keys", "c", "--keys=d", "--warm"], {"keys": ("a", "b", "c", "d"), "warm": True}),
        (["--max-len", "1", "--max-len", "2"], {"max_len": 2}),
    ],
)
def test_given_values(words: list[str], expected: dict[str, Any]) -> None:
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
def test_any_text_is_a_value_or_a_usage_error(text: str) -> None:
    try:
        found = PARSER.parse([f"--max-len={text}"])["max_len"]
    except UsageError as error:
        assert "--max-len is " in error.problem and "\n" not in str(error)
    else:
        assert found is None or isinstance(found, int)


@given(st.lists(st.sampled_from(["--max-len", "8", "--keys", "-", "--warm", "--no-warm", "--x", "-n", "a", "--", "="])))
def test_any_command_line_is_valid_or_a_usage_error(words: list[str]) -> None:
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
        (["--depth=deep"], "--depth is 'deep'", "whole, half, none"),
        (["a", "b"], "unexpected argument 'b'", "prog takes one PLACE"),
        (["--max-lne", "5"], "unknown option --max-lne", "did you mean --max-len?"),
        (["--no-wram"], "unknown option --no-wram", "did you mean --no-warm?"),
        (["--xyzzy"], "unknown option --xyzzy", "see prog --help"),
        (["-q"], "unknown option -q", ""),
        (["--computed", "1"], "unknown option --computed", "see prog --help"),
        (["--quantization", "x"], "unknown option --quantization", ""),  # refused where there is an engine
        (["--keys"], "--keys needs a value", "--keys TEXT ..."),
    ],
)
def test_wrong_values(words: list[str], problem: str, hint: str) -> None:
    with pytest.raises(UsageError) as caught:
        PARSER.parse(words)
    assert caught.value.problem == problem
    assert hint in caught.value.hint


def test_required_values() -> None:
    @dataclass
    class Needs:
        source: Annotated[str, Setting("Where from.", given_as="word", metavar="SRC")]

    with pytest.raises(UsageError, match="SRC is missing"):
        Parser("prog", flags_of(Needs)).parse([])


def test_values_of_files() -> None:
    flags = {flag.name: flag for flag in PARSER.flags}
    assert values.from_data(flags["max_len"], "4K") == 4096
    assert values.from_data(flags["max_len"], None) is None
    assert values.from_data(flags["keys"], "a") == ("a",)
    assert values.from_data(flags["keys"], ["a", "b"]) == ("a", "b")
    assert values.from_data(flags["some_share"], 1) == 1
    assert values.from_data(flags["place"], "x") == Path("x")
    for name, value in (("max_len", True), ("max_len", [1]), ("warm", 1), ("name", 5), ("name", None), ("color", "x")):
        with pytest.raises(UsageError, match=name.replace("_", "-")):
            values.from_data(flags[name], value)


def test_secrets_are_not_shown() -> None:
    with pytest.raises(UsageError) as caught:
        values.from_data(next(flag for flag in PARSER.flags if flag.name == "keys"), 123456)
    assert "123456" not in str(caught.value)


def test_help() -> None:
    with pytest.raises(HelpRequested):
        PARSER.parse(["--help"])
    with pytest.raises(HelpRequested) as caught:
        PARSER.parse(["a", "-h=max-len"])
    text = help_text(PARSER, caught.value.topic)
    assert "--max-len N" in text and "--color" not in text
    whole = help_text(PARSER)
    assert "usage: prog [PLACE] [options]" in whole and "About." in whole
    assert "-n, --name, --called TEXT" in whole
    assert "--[no-]warm" in whole and "--no-ui" in whole
    assert "see --some-share." in whole  # fields are called by their flags
    assert "How much (default: 0.5)." in whole
    assert max(map(len, whole.splitlines())) <= 110
    assert "--color" in help_text(PARSER, "looks") and "--max-len" not in help_text(PARSER, "looks")
    with pytest.raises(UsageError, match="no help on 'x'"):
        help_text(PARSER, "x")


# --- values, in Python ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Ranges:
    count: Annotated[int, Setting("Count.", low=1, high=9)] = 1
    least: Annotated[int, Setting("Least.", low=1, unit="tokens")] = 1
    size: Annotated[int, Setting("Size.", low=8, high=64, power_of_two=True)] = 8
    share: Annotated[float, Setting("Share.", above=0, high=1)] = 1.0
    ratio: Annotated[float, Setting("Ratio.", low=0, below=1)] = 0.0
    rate: Annotated[float, Setting("Rate.", above=0, high=float("inf"), unit="seconds")] = 1.0
    text: Annotated[str, Setting("Text.")] = "x"
    blank: Annotated[str, Setting("Blank.", empty=True)] = ""
    switch: Annotated[bool, Setting("Switch.")] = False
    color: Annotated[Color, Setting("Color.")] = "red"
    names: Annotated[tuple[str, ...], Setting("Names.")] = ()
    keys: Annotated[tuple[str, ...], Setting("Keys.")] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        values.check(self, ConfigError)


@pytest.mark.parametrize(
    ("wrong", "problem", "hint"),
    [
        ({"count": 0}, "count is 0, below the minimum of 1", "use a whole number from 1 to 9"),
        ({"count": True}, "count is True", "use a whole number from 1 to 9"),
        ({"count": "1"}, "count is '1'", "use a whole number from 1 to 9"),
        ({"least": 0}, "least is 0, below the minimum of 1", "use a whole number of tokens of at least 1"),
        ({"size": 24}, "size is 24, not a power of two", "use a power of two from 8 to 64"),
        ({"share": 0}, "share is 0, not above 0", "use a number above 0 and at most 1"),
        ({"share": float("nan")}, "share is nan", "use a number above 0 and at most 1"),
        ({"ratio": 1}, "ratio is 1, not below 1", "use a number of at least 0 and below 1"),
        ({"rate": 0}, "rate is 0, not above 0", "use a number of seconds above 0, or inf"),
        ({"text": ""}, "text is empty", "set it to a value, or remove it"),
        ({"text": 5}, "text is 5", "use a string"),
        ({"switch": 1}, "switch is 1", "use true or false"),
        ({"color": "blue"}, "color is 'blue'", "choose one of red, green"),
        ({"names": "a"}, "names is of type str", "use a list of strings"),
        ({"keys": ("sk-1", 5)}, "keys has an entry that is empty or not a string", "correct or remove it"),
        ({"names": ('["a"]',)}, "names has an entry that is a JSON list", "separate the entries with spaces"),
    ],
)
def test_wrong_values_in_python(wrong: dict[str, Any], problem: str, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Ranges(**wrong)
    assert caught.value.problem == problem
    assert caught.value.hint.startswith(hint)


def test_right_values_in_python() -> None:
    names: Any = ["a"]
    found = Ranges(count=9, size=64, share=0.1, rate=float("inf"), names=names)
    assert found.names == ("a",)


def test_python_and_the_command_line_report_the_same_errors() -> None:
    for kind, name, value in ((EngineConfig, "block_size", 7), (ServerConfig, "body_timeout", -1.0)):
        parser = Parser("prog", flags_of(kind))
        given = parser.parse([f"--{name}={value}", *(["m"] if kind is EngineConfig else [])])
        for make in (lambda kind=kind, given=given: build(kind, given), lambda kind=kind, given=given: kind(**given)):
            with pytest.raises(ConfigError, match=f"^{name} is {value}, .*; use a ") as caught:
                make()
            option = "--" + name.replace("_", "-")
            assert parser.in_flags_words(caught.value.problem).startswith(f"{option} is {value}, ")


def test_markdown() -> None:
    text = reference.markdown(PARSER)
    assert "### Looks\n\n| flag | default | meaning |\n|---|---|---|\n" in text
    assert "| `--color` | `red` | Which. One of `red`, `green`. |" in text
    assert "| `PLACE` |  | Where. |" in text and "| `-n`, `--name`, `--called` | `x` |" in text
    assert "| `--[no-]warm` | `on` | Whether. |" in text


def test_settings_as_markdown() -> None:
    text = reference.settings(Settings)
    assert text.startswith("| setting | default | meaning |\n|---|---|---|\n")
    assert '| `color` | `"red"` | Which. One of `red`, `green`. |' in text
    assert "| `place` |  | Where. |" in text and "| `warm` | `True` | Whether. |" in text


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["--warmup"], "all"),
        (["--warmup", "org/model"], "all"),
        (["--warmup", "--no-ui"], "all"),
        (["--warmup", "none"], "none"),
        (["--warmup=staged"], "staged"),
        (["--warmup=false"], "none"),
        (["--no-warmup"], "none"),
        ([], None),
    ],
)
def test_a_choice_that_was_a_switch(given: list[str], expected: str | None) -> None:
    """--warmup alone is vLLM's and this command's older spelling; a model's name after it is not its value."""
    found = parser_of("run").parse(given)
    assert found.get("warmup") == expected
    assert found.get("model") == ("org/model" if "org/model" in given else None)


def test_help_names_both_spellings() -> None:
    parser = parser_of("run")
    assert "--no-warmup" in help_text(parser, "warmup")
