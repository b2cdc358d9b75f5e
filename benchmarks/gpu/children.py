# SPDX-License-Identifier: Apache-2.0
"""Runs one child at a time and hears what it says: lines of JSON on its standard output.

A child gets its own process group and a deadline; what it said before it was ended counts.
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
SMALL = "XLA_PYTHON_CLIENT_PREALLOCATE"  # false: jax takes of a GPU's memory what it needs, and not most of it
_UNKNOWN = "Unknown flag"


@dataclass(frozen=True)
class Heard:
    lines: list[dict[str, Any]]
    code: int
    seconds: float
    late: bool  # it was ended at its deadline
    said: str  # the end of its standard error

    @property
    def fault(self) -> str | None:
        """Why it gave no whole answer, in one line."""
        if self.late:
            return f"ended after {self.seconds:.0f} s"
        if self.code == 0:
            return None
        if _UNKNOWN in self.said:
            return "unknown flag"
        told = [line for line in self.said.strip().splitlines() if line.strip()]
        return f"code {self.code}: {told[-1][:200] if told else 'it said nothing'}"

    def merged(self) -> dict[str, Any]:
        """All lines as one; later ones win."""
        return {key: value for line in self.lines for key, value in line.items()}


def run(command: Sequence[str], *, seconds: float, env: Mapping[str, str] | None = None) -> Heard:
    """`env` is put over this process's environment."""
    began = time.monotonic()
    with tempfile.TemporaryFile("w+", errors="replace") as errors:
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": errors, "text": True}
        child = subprocess.Popen(command, cwd=ROOT, env=environment(env), start_new_session=True, **pipes)
        late = False
        try:
            said, _ = child.communicate(timeout=max(seconds, 1))
        except subprocess.TimeoutExpired:
            late = True
            end(child)
            said, _ = child.communicate()
        except BaseException:
            end(child)
            raise
        errors.seek(0, os.SEEK_END)
        errors.seek(max(0, errors.tell() - 20_000))
        return Heard(list(_json_lines(said)), child.returncode, time.monotonic() - began, late, errors.read())


def environment(env: Mapping[str, str] | None = None) -> dict[str, str]:
    """Of a child: it finds this code, and takes the GPU's memory as any program would."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    ours = {name: value for name, value in os.environ.items() if name != SMALL}
    return ours | {"PYTHONPATH": os.pathsep.join(paths)} | dict(env or {})


def end(child: subprocess.Popen[Any]) -> None:
    """It and all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def _json_lines(text: str) -> Any:
    for line in text.splitlines():
        try:
            value = json.loads(line)
        except ValueError:
            continue  # a library that prints
        if isinstance(value, dict):
            yield value
