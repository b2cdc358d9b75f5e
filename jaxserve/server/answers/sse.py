# SPDX-License-Identifier: Apache-2.0
"""Writes server-sent events to a client, no faster than it reads; guard.py limits how long it may stall.

Nothing is sent before the first event, so that an earlier error can still be an HTTP status, unless it takes so long
that a comment is due: proxies cut connections on which nothing is sent.
"""

import asyncio
from contextlib import suppress

from aiohttp import HttpVersion11, web

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
        # The headers go with the first events, in one packet.
        self._response._send_headers_immediately = False  # pyright: ignore[reportPrivateUsage]
        self._chunked = request.version == HttpVersion11  # else the end of the connection ends the answer
        if self._chunked:
            self._response.enable_chunked_encoding()
        self._transport: asyncio.Transport | None = None  # once the headers are written
        self._held = b""  # to be sent with what comes next
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
        if not (events or self._held):
            return
        async with self._writing:
            if not self._response.prepared:
                await self._response.prepare(self._request)
            events, self._held = self._held + events, b""
            await self._response.write(events)
            self._transport = self._request.transport
        self._sent = self._loop.time()

    @property
    def ready(self) -> bool:
        """Whether `write` may be called: the headers are sent, and the system has taken everything written so far."""
        transport = self._transport
        if transport is None or self._held or transport.is_closing() or self._writing.locked():
            return False
        return not transport.get_write_buffer_size()

    def write(self, events: bytes) -> None:
        """Write whole events at once. aiohttp would take as long to pass them on as the system takes to send them."""
        if events and self._transport is not None:
            self._transport.write(b"%x\r\n%b\r\n" % (len(events), events) if self._chunked else events)
            self._sent = self._loop.time()

    def hold(self, events: bytes) -> None:
        """Send these with what comes next, at the latest with the end: each packet costs as much as an event."""
        self._held += events

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
        async with self._writing:
            if not self._response.prepared:
                await self._response.prepare(self._request)
            held, self._held = self._held, b""
            await self._response.write_eof(held)
        return self._response
