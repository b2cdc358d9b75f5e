# SPDX-License-Identifier: Apache-2.0
"""How a command of ours ends: every way out as an exit code, every fault as one line.

0 done · 1 a fault, `error: what was wrong  hint: what to do` · 2 wrong usage, said alike ·
130 Ctrl-C · 141 the reader of its output left
"""

import io
import os
import signal
import sys
import traceback
from collections.abc import Callable
from typing import TextIO, cast

from jaxserve.errors import JaxserveError, UsageError, one_line

DEBUG = "JAXSERVE_DEBUG"  # set for processes that a command starts, when it runs with --debug


def guarded(command: Callable[[], object], *, debug: bool = False) -> int:
    """Runs a command of this process and gives its exit code: what it returns, where that is a number."""
    # transformers warns that models need PyTorch; ours do not.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A tensor's name must not crash a terminal that cannot show it.
            stream.reconfigure(errors="backslashreplace")
    try:
        code = command()
        out = cast("TextIO | None", sys.stdout)
        if out is not None:  # it was open when we were started
            out.flush()  # so that a closed pipe shows up here, not at exit
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BrokenPipeError:
        # The reader (`head`, a pager) left. Python flushes once more at exit; give it a sink.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except Exception as error:
        if debug:
            traceback.print_exc()
        print(error_line(error), file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    return code if isinstance(code, int) else 0


def error_line(error: BaseException) -> str:
    """What a user is told of an error."""
    if isinstance(error, JaxserveError):
        return f"error: {error.problem}  hint: {error.hint}"
    if isinstance(error, OSError) and error.strerror:
        place = f": {error.filename}" if error.filename else ""
        return f"error: {one_line(error.strerror + place, limit=2000)}  hint: --debug shows where"
    problem = one_line(f"{type(error).__name__}: {error}", limit=2000)
    return f"error: {problem}  hint: this is a fault of jaxserve; --debug shows where, and a report is welcome"
