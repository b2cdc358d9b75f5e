# SPDX-License-Identifier: Apache-2.0
"""How a command ends: every outcome as an exit code, every error as one line.

0 success · 1 an error, `error: PROBLEM  hint: REMEDY` · 2 wrong usage, in the same form ·
130 Ctrl-C · 141 the reader closed the command's output
"""

import io
import os
import signal
import sys
import traceback
from collections.abc import Callable
from typing import TextIO, cast

from jaxserve.errors import JaxserveError, UsageError, one_line

DEBUG = "JAXSERVE_DEBUG"  # set for the child processes of a command that runs with --debug


def guarded(command: Callable[[], object], *, debug: bool = False) -> int:
    """Runs a command and returns its exit code: what the command returns, if that is a number."""
    # transformers warns that models need PyTorch; jaxserve's do not.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A tensor's name must not crash a terminal that cannot show it.
            stream.reconfigure(errors="backslashreplace")
    try:
        code = command()
        out = cast("TextIO | None", sys.stdout)
        if out is not None:  # it is None if it was closed at startup
            out.flush()  # so that a closed pipe raises here, not at exit
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BrokenPipeError:
        # The reader (`head`, a pager) is gone. Python flushes again at exit: redirect that to /dev/null.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except Exception as error:
        if debug:
            traceback.print_exc()
        print(error_line(error), file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    return code if isinstance(code, int) else 0


def error_line(error: BaseException) -> str:
    """The line that a user sees for an error."""
    if isinstance(error, JaxserveError):
        return f"error: {error.problem}  hint: {error.hint}"
    if isinstance(error, OSError) and error.strerror:
        place = f": {error.filename}" if error.filename else ""
        return f"error: {one_line(error.strerror + place, limit=2000)}  hint: run with --debug for the traceback"
    problem = one_line(f"{type(error).__name__}: {error}", limit=2000)
    return f"error: {problem}  hint: this is a bug in jaxserve; please report it with the traceback that --debug shows"
