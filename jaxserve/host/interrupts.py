# SPDX-License-Identifier: Apache-2.0
"""Defers Ctrl-C to where it does no harm: a signal that comes while state changes is handled after the change."""

import signal
import threading
from types import FrameType


class Deferred:
    """with Deferred() as interrupts: ...  SIGINT waits for `interrupts.allow()`, or for the end of the block.

    A second one does not wait. Only the main thread is interrupted: in other threads, or if the program ignores SIGINT,
    this does nothing.
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
        """Handles a signal that came as the program would have: usually by a KeyboardInterrupt."""
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
