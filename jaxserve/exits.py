# SPDX-License-Identifier: Apache-2.0
"""How a command of ours ends: every way out as an exit code.

0 done · 1 the user's error, one line `error: what was wrong; what to do` · 2 wrong usage ·
130 Ctrl-C · 141 the reader of its output left
"""

import io
import os
import signal
import sys
from collections.abc import Callable

from jaxserve.errors import JaxserveError


def guarded(command: Callable[[], object]) -> int:
    """Runs a command of this process and gives its exit code. Parsing is the command's own: it exits with 2."""
    # transformers warns that models need PyTorch; ours do not.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A tensor's name must not crash a terminal that cannot show it.
            stream.reconfigure(errors="backslashreplace")
    try:
        command()
        sys.stdout.flush()  # so that a closed pipe shows up here, not at exit
    except JaxserveError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BrokenPipeError:
        # The reader (`head`, a pager) left. Python flushes once more at exit; give it a sink.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    return 0
