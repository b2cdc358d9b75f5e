# SPDX-License-Identifier: Apache-2.0
"""A dataclass as a command: its fields are the flags, its `run` does the work."""

import sys
from collections.abc import Sequence
from typing import Any

from jaxserve.errors import JaxserveError, UsageError
from jaxserve.flags import values
from jaxserve.flags.parser import HelpRequested, Parser
from jaxserve.flags.setting import build, flags_of


def parser_of(kind: type, prog: str, about: str) -> Parser:
    return Parser(prog, flags_of(kind), about=about)


def run(kind: Any, arguments: Sequence[str], *, prog: str, about: str) -> int | None:
    """Parses the arguments and runs the command, or prints its help. A command that does not simply hold what was
    given has a class method `of(parser, given)`. Wrong settings are wrong usage of their flags."""
    parser = parser_of(kind, prog, about)
    try:
        given = parser.parse(arguments)
    except HelpRequested as wanted:
        from jaxserve.flags.help import help_text

        print(help_text(parser, wanted.topic), flush=True)  # so that a closed pipe is noticed here
        sys.exit(0)
    try:
        command = kind.of(parser, given) if hasattr(kind, "of") else build(kind, given)
        values.check(command)
    except JaxserveError as error:
        raise UsageError(parser.in_flags_words(error.problem), parser.in_flags_words(error.hint)) from None
    if not hasattr(command, "notes"):  # else the command shows them itself
        for note in parser.notes:
            print(f"note: {note}", file=sys.stderr)
    try:
        return command.run()
    except JaxserveError as error:  # which names settings as Python programs do
        wrong = UsageError if isinstance(error, UsageError) else JaxserveError
        raise wrong(parser.in_flags_words(error.problem), parser.in_flags_words(error.hint)) from error
