# SPDX-License-Identifier: Apache-2.0
"""Sends a child's messages to its parent without blocking: the engine's steps continue while the parent is busy.

What the socket has no room for is kept here and sent first the next time. While more than MOST_KEPT bytes are kept,
`wait` blocks. So the child does not compute for a hung parent, its memory is bounded, no message is lost or merged, and
work continues when the parent does. If the parent is gone, the child's reader ends the process.
"""

import select
import socket
import threading
from typing import Any

from jaxserve.frontend import wire

MOST_KEPT = 64 << 20


class Outbox:
    """Any thread may send."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end
        self._lock = threading.Lock()
        self._kept = bytearray()

    @property
    def kept(self) -> int:
        """The number of bytes not sent yet."""
        return len(self._kept)

    def send(self, *messages: Any) -> None:
        made = wire.frame(messages)
        with self._lock:
            if self._kept:
                self._kept += made
            else:
                self._kept = made
            self._flush()

    def flush(self) -> None:
        with self._lock:
            self._flush()

    def _flush(self) -> None:
        done = 0
        try:
            with memoryview(self._kept) as rest:
                while done < len(rest):
                    with rest[done:] as piece:  # if a debugger holds it, it must not keep what was sent
                        done += self._end.send(piece, socket.MSG_DONTWAIT)
        except BlockingIOError:
            pass
        except OSError:  # the parent is gone
            done = len(self._kept)
        del self._kept[:done]

    def wait(self) -> None:
        """Block while too much is kept."""
        while self.kept > MOST_KEPT:
            self._until_room(None)

    def finish(self, seconds: float) -> None:
        """Send the rest; give up if the parent reads nothing for `seconds`."""
        while self.kept and self._until_room(seconds):
            pass

    def _until_room(self, seconds: float | None) -> bool:
        room = select.poll()  # select() does not support descriptors above 1023
        room.register(self._end, select.POLLOUT)
        ready = bool(room.poll(None if seconds is None else 1000 * seconds))
        self.flush()
        return ready
