# SPDX-License-Identifier: Apache-2.0
"""The `jaxserve` command: parse, run, and turn every way out into an exit code.

0 done · 1 the user's error, one line `error: what was wrong; what to do` · 2 wrong usage ·
130 Ctrl-C. A command is a frozen dataclass whose fields are its flags, in a file of its own; those
files import heavy packages inside `run`, so that `--help` stays quick.
"""

import io
import os
import signal
import sys
from collections.abc import Sequence

import tyro

from jaxserve.cli.devices import Devices
from jaxserve.cli.inspect import Inspect
from jaxserve.cli.version import Version
from jaxserve.errors import JaxserveError


def main(argv: Sequence[str] | None = None) -> int:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A tensor's name must not crash a terminal that cannot show it.
            stream.reconfigure(errors="backslashreplace")
    try:
        command = tyro.cli(
            Version | Devices | Inspect,
            prog="jaxserve",
            description="Serve language models from JAX.",
            args=argv,
            config=(tyro.conf.FlagCreatePairsOff,),
        )
        command.run()
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
