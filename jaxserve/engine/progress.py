# SPDX-License-Identifier: Apache-2.0
"""Reports how many programs are compiled while an engine starts."""

import sys
from collections.abc import Callable
from concurrent.futures import Future

from jaxserve.engine.execute.loading import OnProgress
from jaxserve.models.decoder import Params

type Report = Callable[[str], None]


def to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


class StartProgress:
    """Reports `compiling 7/18 (12 s)` once the weights are read: in place on a terminal, else every `EVERY` seconds and
    at the end."""

    EVERY = 15.0  # seconds

    def __init__(self, report: Report, on_progress: OnProgress | None, reading: Future[Params]) -> None:
        self._report, self._on_progress, self._reading, self._last = report, on_progress, reading, ""
        self._live = report is to_stderr and sys.stderr.isatty()
        self._next = self.EVERY

    def __call__(self, done: int, count: int, seconds: float) -> None:
        self._last = f"compiling {done}/{count} ({seconds:.0f} s)"
        if not self._reading.done():
            return
        if self._on_progress is not None:
            self._on_progress("compiling", done, count)
        if self._live:
            print(f"\r{self._last}", end="", file=sys.stderr, flush=True)
        elif seconds >= self._next and done < count:
            self._next = seconds + self.EVERY
            self._report(self._last)

    def close(self) -> None:
        if self._live and self._last:
            print(f"\r{self._last}", file=sys.stderr)
        elif self._last:
            self._report(self._last)
