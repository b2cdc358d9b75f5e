# SPDX-License-Identifier: Apache-2.0
"""The text that --help prints: all flags, the common ones, a group, or one flag."""

import shutil
import textwrap
from collections.abc import Sequence
from dataclasses import MISSING

from jaxserve.errors import UsageError
from jaxserve.flags.parser import Parser
from jaxserve.flags.setting import Flag

MANY = 40  # a command with more flags shows the common ones first


def help_text(parser: Parser, topic: str | None = None) -> str:
    """What --help=TOPIC shows, TOPIC being all, a group or a flag; without one the common flags."""
    if topic is not None and topic != "all":
        return _text(parser, _about_topic(parser, topic))
    if topic == "all" or len(parser.flags) <= MANY:
        return _text(parser, parser.flags)
    few = _text(parser, [flag for flag in parser.flags if flag.setting.common])
    groups = ", ".join(dict.fromkeys(flag.group for flag in parser.flags))
    return f"{few}\n\nMore help: --help=all, --help=FLAG or --help=GROUP.\nGroups: {groups}."


def _about_topic(parser: Parser, topic: str) -> list[Flag]:
    if found := [flag for flag in parser.flags if flag.group.lower() == topic.lower()]:
        return found
    word = topic.strip("-").replace("_", "-")
    for flag in parser.flags:
        if word in {name.lstrip("-") for name in (*flag.options, flag.negative or "")}:
            return [flag]
    known = ", ".join(dict.fromkeys(flag.group for flag in parser.flags))
    raise UsageError(f"no help on {topic!r}", f"name a flag, all, or a group: {known}")


def _text(parser: Parser, flags: Sequence[Flag]) -> str:
    width = max(60, min(shutil.get_terminal_size().columns, 110))
    words = [flag for flag in parser.flags if flag.is_word]
    places = " ".join(f"[{f.metavar}]" if f.is_option or f.default is not MISSING else f.metavar for f in words)
    lines = [f"usage: {parser.prog} {places + ' ' if places else ''}[options]"]
    if parser.about:
        lines += ["", *_wrapped(parser.about, width, "")]
    for group in dict.fromkeys(flag.group for flag in flags):
        lines += ["", f"{group}:"]
        for flag in sorted((flag for flag in flags if flag.group == group), key=lambda flag: not flag.is_word):
            lines += _flag_lines(flag, parser.in_flags_words(flag.help), width)
    return "\n".join(lines)


def _flag_lines(flag: Flag, about: str, width: int) -> list[str]:
    if not flag.is_option:
        left = flag.metavar
    elif flag.base is bool:
        positive = f"--[no-]{flag.name.removeprefix('no_').replace('_', '-')}"
        left = flag.option if flag.default is False else ", ".join((*flag.setting.spellings, positive))
    else:
        left = f"{', '.join(flag.options)} {flag.value_form}"
        left = f"{left}, {flag.negative}" if flag.negative else left
        left = f"{flag.metavar}, {left}" if flag.is_word else left
    indent = " " * 36
    if flag.shown_default:
        about = f"{about.removesuffix('.')} (default: {flag.shown_default})."
    lines = _wrapped(about, width, indent) or [""]
    if len(left) > 32:
        return [f"  {left}", *lines]
    return [f"  {left:<34}{lines[0].strip()}", *lines[1:]]


def _wrapped(text: str, width: int, indent: str) -> list[str]:
    return textwrap.wrap(text, width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)
