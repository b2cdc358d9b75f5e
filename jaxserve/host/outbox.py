# SPDX-License-Identifier: Apache-2.0
"""Sends a child's messages to its parent without blocking: the engine's steps continue while the parent is busy.

The socket takes what it has room for; the rest is kept here and goes first the next time. When more than MOST_KEPT
bytes are kept, `wait` blocks. So the child does not compute for a parent that hangs, its memory is bounded, nothing is
lost or merged, and work continues when the parent does. If the parent is gone, the child's reader ends the process.
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
        """Bytes that the socket has not taken yet."""
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
                    done += self._end.send(rest[done:], socket.MSG_DONTWAIT)
        except BlockingIOError:
            pass
        except OSError:  # the parent is gone
            done = len(self._kept)
        del self._kept[:done]

    def wait(self) -> None:
        """While too much is kept."""
        while self.kept > MOST_KEPT:
            self._until_room(None)

    def finish(self, seconds: float) -> None:
        """Sends the rest, as long as the parent takes some of it within so many seconds."""
        while self.kept and self._until_room(seconds):
            pass

    def _until_room(self, seconds: float | None) -> bool:
        room = select.poll()  # select() takes no descriptor above 1023
        room.register(self._end, select.POLLOUT)
        ready = bool(room.poll(None if seconds is None else 1000 * seconds))
        self.flush()
        return ready
