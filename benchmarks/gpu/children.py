# SPDX-License-Identifier: Apache-2.0
"""Runs one child process at a time and reads the lines of JSON that it prints.

A child gets its own process group and a deadline; what it printed before it was killed counts.
"""

import contextlib
import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PREALLOCATE = "XLA_PYTHON_CLIENT_PREALLOCATE"  # false: JAX takes GPU memory as needed, not most of it at once
_UNKNOWN = "Unknown flag"


@dataclass(frozen=True)
class ChildResult:
    lines: list[dict[str, Any]]
    code: int
    seconds: float
    late: bool  # it was killed at its deadline
    stderr: str  # the end of it

    @property
    def fault(self) -> str | None:
        """Why the result is incomplete, in one line; None if it is complete."""
        if self.late:
            return f"killed after {self.seconds:.0f} s"
        if self.code == 0:
            return None
        if _UNKNOWN in self.stderr:
            return "unknown flag"
        printed = [line for line in self.stderr.strip().splitlines() if line.strip()]
        return f"exit code {self.code}: {printed[-1][:200] if printed else 'nothing on stderr'}"

    def merged(self) -> dict[str, Any]:
        """All lines as one; later ones win."""
        return {key: value for line in self.lines for key, value in line.items()}


def run(command: Sequence[str], *, seconds: float, env: Mapping[str, str] | None = None) -> ChildResult:
    """`env` is added to this process's environment."""
    began = time.monotonic()
    with tempfile.TemporaryFile("w+", errors="replace") as errors:
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": errors, "text": True}
        child = subprocess.Popen(command, cwd=ROOT, env=environment(env), start_new_session=True, **pipes)
        late = False
        try:
            stdout, _ = child.communicate(timeout=max(seconds, 1))
        except subprocess.TimeoutExpired:
            late = True
            end(child)
            stdout, _ = child.communicate()
        except BaseException:
            end(child)
            raise
        errors.seek(0, os.SEEK_END)
        errors.seek(max(0, errors.tell() - 20_000))
        return ChildResult(list(_json_lines(stdout)), child.returncode, time.monotonic() - began, late, errors.read())


def environment(env: Mapping[str, str] | None = None) -> dict[str, str]:
    """A child's environment: it imports this checkout, and JAX preallocates GPU memory as usual."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    ours = {name: value for name, value in os.environ.items() if name != PREALLOCATE}
    return ours | {"PYTHONPATH": os.pathsep.join(paths)} | dict(env or {})


def end(child: subprocess.Popen[Any]) -> None:
    """Kills the child and every process that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def _json_lines(text: str) -> Any:
    for line in text.splitlines():
        try:
            value = json.loads(line)
        except ValueError:
            continue  # printed by a library
        if isinstance(value, dict):
            yield value
