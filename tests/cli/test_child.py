# SPDX-License-Identifier: Apache-2.0
"""Which faults of an engine's process print a traceback."""

import os
import socket
import subprocess
import sys
from dataclasses import asdict

import pytest

from jaxserve.config import EngineConfig
from jaxserve.frontend import wire

SCRIPT = """
import sys
from jaxserve.config import ConfigError
from jaxserve.errors import EngineError
from jaxserve.host import child
def fails(*_):
    error = {error}
    error.__cause__ = {cause}
    raise error
child._load = fails
child.main(sys.argv[1:])
"""


@pytest.mark.parametrize(
    ("error", "cause", "traced"),
    [
        ("ConfigError('no network', 'connect')", "OSError('x')", False),
        ("EngineError('failed', 'again')", "None", False),
        ("EngineError('failed', 'again')", "KeyError('x')", True),
        ("KeyError('x')", "None", True),
    ],
)
@pytest.mark.parametrize("debug", [False, True])
def test_errors_that_a_user_can_fix_have_no_traceback(error: str, cause: str, *, traced: bool, debug: bool) -> None:
    ours, its = socket.socketpair()
    with ours, its:
        ours.sendall(wire.frame([wire.Start(asdict(EngineConfig(model="x")), None)]))
        script = SCRIPT.format(error=error, cause=cause)
        result = subprocess.run(
            [sys.executable, "-c", script, "--fd", str(its.fileno())],
            pass_fds=[its.fileno()],
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
            env={**os.environ, "JAXSERVE_DEBUG": "1" if debug else ""},
        )
    assert result.returncode == 1
    assert ("Traceback" in result.stderr) == (traced or debug), result.stderr
