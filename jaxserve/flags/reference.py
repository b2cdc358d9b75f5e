# SPDX-License-Identifier: Apache-2.0
"""Tables in Markdown: the flags of a command by group, and the settings of a Python program."""

import re
from dataclasses import MISSING

from jaxserve.flags.parser import Parser
from jaxserve.flags.setting import Flag, flags_of


def markdown(parser: Parser, *, heading: str = "###") -> str:
    """All flags: a heading and a table for each group."""
    parts: list[str] = []
    for group in dict.fromkeys(flag.group for flag in parser.flags):
        rows = [_row(parser, flag) for flag in parser.flags if flag.group == group]
        parts.append("\n".join([f"{heading} {group}", "", "| flag | default | meaning |", "|---|---|---|", *rows]))
    return "\n\n".join(parts) + "\n"


def settings(kind: type) -> str:
    """The flags of a dataclass as the keyword arguments of a program."""
    lines = ["| setting | default | meaning |", "|---|---|---|"]
    for flag in flags_of(kind):
        default = f'"{flag.default}"' if isinstance(flag.default, str) else flag.default
        shown = "" if flag.default in (MISSING, None) else f"`{default}`"
        lines.append(_line(f"`{flag.name}`", shown, _about(flag, flag.help)))
    return "\n".join(lines) + "\n"


def _row(parser: Parser, flag: Flag) -> str:
    names = [flag.metavar] if flag.is_word else []
    if flag.negative and flag.default is True:
        names.append(f"--[no-]{flag.option[2:]}")
    elif flag.is_option:
        names += [*flag.options, *([flag.negative] if flag.negative and flag.base is not bool else [])]
    default = flag.shown_default
    about = _about(flag, parser.in_flags_words(flag.help))
    return _line(", ".join(f"`{name}`" for name in names), f"`{default}`" if default else "", about)


def _about(flag: Flag, help: str) -> str:
    return f"{help} One of {', '.join(f'`{choice}`' for choice in flag.choices)}." if flag.choices else help


def _line(*cells: str) -> str:
    return "| " + " | ".join(map(_escaped, cells)) + " |"


def _escaped(cell: str) -> str:
    """A vertical bar ends a cell even in a code span; an asterisk has a meaning only outside of one."""
    return re.sub(r"(`[^`]*`)|\*", lambda match: match[1] or r"\*", cell).replace("|", r"\|")
