# SPDX-License-Identifier: Apache-2.0
"""The flags of a command as tables in Markdown, one for each group."""

import re

from jaxserve.flags.parser import Parser
from jaxserve.flags.setting import Flag


def markdown(parser: Parser, *, heading: str = "###") -> str:
    """All flags: a heading and a table for each group."""
    parts: list[str] = []
    for group in dict.fromkeys(flag.group for flag in parser.flags):
        rows = [_row(parser, flag) for flag in parser.flags if flag.group == group]
        parts.append("\n".join([f"{heading} {group}", "", "| flag | default | meaning |", "|---|---|---|", *rows]))
    return "\n\n".join(parts) + "\n"


def _row(parser: Parser, flag: Flag) -> str:
    names = [flag.metavar] if flag.is_word else []
    if flag.negative and flag.default is True:
        names.append(f"--[no-]{flag.option[2:]}")
    elif flag.is_option:
        names += [*flag.options, *([flag.negative] if flag.negative and flag.base is not bool else [])]
    default = flag.shown_default
    about = parser.in_flags_words(flag.help)
    if flag.choices:
        about += f" One of {', '.join(f'`{choice}`' for choice in flag.choices)}."
    cells = (", ".join(f"`{name}`" for name in names), f"`{default}`" if default else "", about)
    return "| " + " | ".join(map(_escaped, cells)) + " |"


def _escaped(cell: str) -> str:
    """A vertical bar ends a cell even in a code span; an asterisk has a meaning only outside of one."""
    return re.sub(r"(`[^`]*`)|\*", lambda match: match[1] or r"\*", cell).replace("|", r"\|")
