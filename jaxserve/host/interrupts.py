# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C only where it does no harm: a signal that comes while state changes is answered after it."""

import signal
import threading
from types import FrameType


class Deferred:
    """with Deferred() as interrupts: ...  SIGINT waits for `interrupts.allow()`, or for the end of the block.

    A second one does not wait. Only the main thread is ever interrupted: elsewhere this does nothing, nor where
    the program has SIGINT ignored.
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
        """Answers a signal that came, as the program would have: usually by a KeyboardInterrupt."""
        if self._came is not None:
            came, self._came = self._came, None
            self._answer(*came)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._came is not None:
            self._came = None
            self._answer(number, frame)
        self._came = (number, frame)

    def _answer(self, number: int, frame: FrameType | None) -> None:
        if callable(self._handler):
            self._handler(number, frame)
