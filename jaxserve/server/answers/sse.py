# SPDX-License-Identifier: Apache-2.0
"""Writes server-sent events to a client, no faster than it reads; guard.py limits how long it may stall.

Nothing is sent before the first event, so that an earlier error can still be an HTTP status.
"""

from aiohttp import web

from jaxserve.server.errors import ApiError

DONE = b"data: [DONE]\n\n"
HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",  # otherwise nginx buffers the events
}


def event(data: bytes) -> bytes:
    return b"data: %b\n\n" % data


class EventStream:
    """The events of one answer."""

    def __init__(self, request: web.Request) -> None:
        self._request = request
        self._response = web.StreamResponse(headers=HEADERS)

    @property
    def started(self) -> bool:
        """Whether the status was sent, so that errors can only be events."""
        return self._response.prepared

    async def send(self, events: bytes) -> None:
        """Write whole events; wait while too much is unread. Raises ConnectionResetError if the client has left."""
        if not events:
            return
        if not self._response.prepared:
            await self._response.prepare(self._request)
        await self._response.write(events)

    async def fail(self, error: ApiError) -> None:
        """End an answer that cannot continue."""
        await self.send(event(error.body()) + DONE)

    async def close(self) -> web.StreamResponse:
        await self._response.write_eof()
        return self._response
