# SPDX-License-Identifier: Apache-2.0
"""Defers Ctrl-C to a safe point: a signal that arrives during a state change is handled after the change."""

import signal
import threading
from types import FrameType


class Deferred:
    """with Deferred() as interrupts: ...  SIGINT waits for `interrupts.allow()`, or for the end of the block.

    A second SIGINT is handled immediately. No effect outside the main thread, which alone is interrupted, or if the
    program ignores SIGINT.
    """

    def __init__(self) -> None:
        self._handler: signal.Handlers | object = None
        self._came: tuple[int, FrameType | None] | None = None

    def __enter__(self) -> "Deferred":
        if threading.current_thread() is threading.main_thread():
            handler = signal.getsignal(signal.SIGINT)
            if callable(handler):
                self._handler = handler
                signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        if callable(self._handler):
            signal.signal(signal.SIGINT, self._handler)
        self.allow()

    def allow(self) -> None:
        """Handle a deferred signal with the program's own handler, which usually raises KeyboardInterrupt."""
        if self._came is not None:
            came, self._came = self._came, None
            self._handle(*came)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._came is not None:
            self._came = None
            self._handle(number, frame)
        self._came = (number, frame)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if callable(self._handler):
            self._handler(number, frame)
