# SPDX-License-Identifier: Apache-2.0
"""Writes server-sent events to a client, no faster than it reads; guard.py limits how long it may stall.

Nothing is sent before the first event, so that an earlier error can still be an HTTP status, unless it takes so long
that a comment is due: proxies cut connections on which nothing is sent.
"""

import asyncio
from contextlib import suppress

from aiohttp import web

from jaxserve.server.errors import ApiError

DONE = b"data: [DONE]\n\n"
COMMENT = b": keep-alive\n\n"
HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",  # otherwise nginx buffers the events
}


def event(data: bytes) -> bytes:
    return b"data: %b\n\n" % data


class EventStream:
    """The events of one answer. `keep_alive`: seconds without an event after which a comment is sent; 0: never.

    `stop` must be called at the end.
    """

    def __init__(self, request: web.Request, *, keep_alive: float) -> None:
        self._request = request
        self._response = web.StreamResponse(headers=HEADERS)
        self._writing = asyncio.Lock()
        self._loop = asyncio.get_running_loop()
        self._keep_alive, self._sent = keep_alive, self._loop.time()
        self._timer = self._loop.call_later(keep_alive, self._tick) if keep_alive else None
        self._comment: asyncio.Task[None] | None = None

    @property
    def started(self) -> bool:
        """Whether the status was sent, so that errors can only be events."""
        return self._response.prepared

    async def send(self, events: bytes) -> None:
        """Write whole events; wait while too much is unread. Raises ConnectionResetError if the client has left."""
        if not events:
            return
        async with self._writing:
            if not self._response.prepared:
                await self._response.prepare(self._request)
            await self._response.write(events)
        self._sent = self._loop.time()

    def _tick(self) -> None:
        silent = self._loop.time() - self._sent
        if silent >= self._keep_alive:
            silent = 0.0
            if not self._writing.locked():  # otherwise the client has not read the last events yet
                self._comment = self._loop.create_task(self._send_comment())
        self._timer = self._loop.call_later(self._keep_alive - silent, self._tick)

    async def _send_comment(self) -> None:
        with suppress(ConnectionError):  # the handler is cancelled when its client leaves
            await self.send(COMMENT)

    def stop(self) -> None:
        """Send no more comments."""
        if self._timer is not None:
            self._timer.cancel()
        if self._comment is not None:
            self._comment.cancel()

    async def fail(self, error: ApiError) -> None:
        """End an answer that cannot continue."""
        await self.send(event(error.body()) + DONE)

    async def close(self) -> web.StreamResponse:
        await self._response.write_eof()
        return self._response
