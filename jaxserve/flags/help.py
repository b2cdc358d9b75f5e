# SPDX-License-Identifier: Apache-2.0
"""The text that --help prints."""

import shutil
import textwrap
from collections.abc import Sequence
from dataclasses import MISSING
from typing import cast

from jaxserve.errors import UsageError
from jaxserve.flags.parsing import Flag, Parser, value_of


def help_text(parser: Parser, *, groups: Sequence[str] | None = None, names: Sequence[str] | None = None) -> str:
    """Usage and flags: all of them, those of some groups, or some by name."""
    width = max(60, min(shutil.get_terminal_size().columns, 110))
    places = " ".join(f"[{f.metavar}]" if f.default is not MISSING else f.metavar for f in parser.flags if f.positional)
    lines = [f"usage: {parser.prog} {places + ' ' if places else ''}[options]"]
    if parser.about:
        lines += ["", *_wrapped(parser.about, width, "")]
    chosen = [
        flag
        for flag in parser.flags
        if (groups is None or flag.group in groups) and (names is None or flag.name in names)
    ]
    for group in dict.fromkeys(flag.group for flag in chosen):
        lines += ["", f"{group}:"]
        for flag in chosen:
            if flag.group == group:
                lines += _flag_lines(flag, parser.in_flags_words(flag.help), width)
    return "\n".join(lines)


def topic_help(parser: Parser, topic: str | None) -> str:
    """All flags; or those of a group, or one flag."""
    if topic in (None, "all"):
        return help_text(parser)
    assert topic is not None
    groups = {flag.group.lower(): flag.group for flag in parser.flags}
    if topic.lower() in groups:
        return help_text(parser, groups=[groups[topic.lower()]])
    word = topic.strip("-").replace("_", "-")
    for flag in parser.flags:
        spelled = (flag.name.replace("_", "-"), *flag.options, flag.negative or "")
        if word in {name.lstrip("-") for name in spelled}:
            return help_text(parser, names=[flag.name])
    known = ", ".join(dict.fromkeys(flag.group for flag in parser.flags))
    raise UsageError(f"there is no help on {topic!r}", f"name a flag, all, or one of {known}")


def _flag_lines(flag: Flag, about: str, width: int) -> list[str]:
    if flag.positional:
        left = flag.metavar
    elif flag.base is bool:
        left = ", ".join((*flag.more, f"--[no-]{flag.name.removeprefix('no_').replace('_', '-')}"))
        left = flag.option if flag.default is False else left
    else:
        left = f"{', '.join(flag.options)} {value_of(flag)}"
    if flag.default not in (MISSING, None, False, ()) and flag.default != "":
        default = flag.default
        shown = " ".join(map(str, cast("tuple[object, ...]", default))) if isinstance(default, tuple) else default
        about += f" (default: {'on' if shown is True else shown})"
    indent = " " * 36
    lines = _wrapped(about, width, indent) or [""]
    if len(left) > 32:
        return [f"  {left}", *lines]
    return [f"  {left:<34}{lines[0].strip()}", *lines[1:]]


def _wrapped(text: str, width: int, indent: str) -> list[str]:
    return textwrap.wrap(text, width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)
