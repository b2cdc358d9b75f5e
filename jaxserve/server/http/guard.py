# SPDX-License-Identifier: Apache-2.0
"""Limits on what connections can cost: slow or idle clients, too many connections, unread responses, invalid HTTP.

aiohttp waits long for headers and bodies that arrive byte by byte, and forever for a client that never reads. Here
every wait has a timeout.
"""

import asyncio
import logging
import re
import resource
from typing import Any, cast

from aiohttp import hdrs, web
from aiohttp.http_exceptions import ContentEncodingError, HttpProcessingError, LineTooLong
from aiohttp.web_protocol import RequestHandler

from jaxserve.errors import one_line
from jaxserve.server.config import ServerConfig
from jaxserve.server.errors import MESSAGES, ApiError

LOG = logging.getLogger("jaxserve.server")
SPARE_FILES = 64  # file descriptors reserved for other uses
MAX_BODIES = 2**29  # bytes of all request bodies in memory; above it only small bodies are accepted
SMALL_BODY = 2**16
ENCODINGS = ("identity", "gzip", "deflate")
LINGER = 2.0  # seconds for which the rest of a refused request's body is read
LONGEST_LINE = 8190  # bytes of the URL or a header: aiohttp's limit
SLOWEST = 1024  # minimum average bytes/s of a body after header_timeout
FULL = b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 5\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


class Connections:
    """The open connections, least recently used first. A new one replaces the first that is idle."""

    def __init__(self, config: ServerConfig) -> None:
        self.config = config
        self.most = min(config.max_connections, _room_for_files())
        self.open: dict[Connection, None] = {}

    def admit(self, connection: "Connection") -> bool:
        if len(self.open) >= self.most:
            idle = next((other for other in self.open if other.idle), None)
            if idle is None:
                return False
            idle.force_close()
            self.open.pop(idle, None)
        self.open[connection] = None
        return True

    def renew(self, connection: "Connection") -> None:
        """Mark as most recently used."""
        if self.open.pop(connection, 0) is None:
            self.open[connection] = None

    def factory(self, server: web.Server, loop: asyncio.AbstractEventLoop) -> "Connection":
        return Connection(self, server, loop=loop)


def _room_for_files() -> int:
    """The number of connections that RLIMIT_NOFILE allows, after raising the soft limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft != hard:
        wanted = 2**16 if hard == resource.RLIM_INFINITY else min(hard, 2**16)
        if wanted > soft:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            soft = wanted
    return 2**20 if soft == resource.RLIM_INFINITY else max(soft - SPARE_FILES, 16)


class Connection(RequestHandler):
    def __init__(self, connections: Connections, server: web.Server, *, loop: asyncio.AbstractEventLoop) -> None:
        config = connections.config
        # No access log: middleware logs more detail. The short lingering_time drains bodies of refused requests.
        options: dict[str, Any] = {"access_log": None, "lingering_time": LINGER}
        super().__init__(server, loop=loop, keepalive_timeout=config.keep_alive_timeout, **options)
        self._connections = connections
        self._timer: asyncio.TimerHandle | None = None
        self._writing_timer: asyncio.TimerHandle | None = None

    @property
    def idle(self) -> bool:
        """Between two requests, or before the first."""
        return self._waiter is not None and not self._waiter.done()

    def begin(self, request: web.Request) -> None:
        """Call before a request is handled. The rest of a compressed body that nobody wants is not read: unpacking it
        would stop the event loop, and a few kilobytes can unpack to gigabytes."""
        self._lingering_time = LINGER if encoding_of(request) == "identity" else 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        if not self._connections.admit(self):
            socket = cast(asyncio.Transport, transport)
            socket.write(FULL)
            socket.close()
            return
        if transport.get_extra_info("ssl_object") is None:  # TLS has its own shutdown timeout
            # With high=0, any unread byte pauses writing and so starts the stream_timeout timer. Otherwise a closing
            # connection with a small unread remainder would wait forever.
            cast(asyncio.Transport, transport).set_write_buffer_limits(high=0)
        self._await_head()
        super().connection_made(transport)

    def _await_head(self) -> None:
        if self._timer is None:
            self._timer = self._loop.call_later(self._connections.config.header_timeout, self._close_if_silent)

    def _close_if_silent(self) -> None:
        self._timer = None
        if self.idle and self.transport is not None:
            self.transport.abort()

    def data_received(self, data: bytes) -> None:
        if self.transport is None:  # the connection was refused
            return
        heads = self._request_count
        super().data_received(data)
        self._connections.renew(self)
        if self._request_count > heads:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
        elif self.idle and data.strip(b"\r\n"):  # HTTP allows empty lines before the request line
            self._await_head()

    def connection_lost(self, exc: BaseException | None) -> None:
        self._connections.open.pop(self, None)
        for timer in (self._timer, self._writing_timer):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    # --- a client that does not read --------------------------------------------------------------------------------

    def pause_writing(self) -> None:
        super().pause_writing()
        self._writing_timer = self._loop.call_later(self._connections.config.stream_timeout, self._cut)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._writing_timer is not None:
            self._writing_timer.cancel()
            self._writing_timer = None

    def _cut(self) -> None:
        self._writing_timer = None
        if self.transport is not None:
            LOG.warning(
                "closed a connection: the client read nothing for %g s (--stream-timeout)",
                self._connections.config.stream_timeout,
            )
            self.transport.abort()

    # --- invalid HTTP -----------------------------------------------------------------------------------------------

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        if request.writer.output_size > 0:
            raise ConnectionError("the response has already begun")
        if status >= 500:
            LOG.error("request failed outside its handler", exc_info=exc)
            answer = ApiError(status, MESSAGES[500]).response()
        else:
            fault = _malformed(status, exc, message or "")
            LOG.debug("%s", fault.message)
            answer = fault.response()
        answer.headers[hdrs.SERVER] = "jaxserve"
        answer.force_close()
        return answer

    def log_exception(self, *args: Any, **kw: Any) -> None:
        fault = kw.get("exc_info")
        if isinstance(fault, web.RequestPayloadError | HttpProcessingError):
            # Raised while the rest of a body is drained after the response. Debug level: clients could flood the log.
            LOG.debug("malformed request body after the response: %s", one_line(str(fault), limit=100))
        else:
            super().log_exception(*args, **kw)


def _malformed(status: int, error: BaseException | None, message: str) -> ApiError:
    """The response to a request that aiohttp could not parse."""
    if isinstance(error, LineTooLong):  # its message repeats what the client sent
        limit = f"Invalid HTTP request: its URL or one of its headers is longer than {LONGEST_LINE} bytes."
        return ApiError(status, f"{limit} Shorten it, or send the data in the body.")
    if isinstance(error, ContentEncodingError) and (name := re.search(r"content-encoding: .*\((\w+)\)", message)):
        return _unsupported_encoding(name[1])  # known to aiohttp, but its library is not installed
    if isinstance(error, ContentEncodingError):
        return ApiError(status, "The request body does not match its Content-Encoding.")
    # Only the first line: the rest repeats the client's input.
    reason = one_line(message.split("\n", 1)[0].strip(" :."), limit=100)
    return ApiError(status, f"Invalid HTTP request: {reason or 'malformed'}.")


# --- bodies ---------------------------------------------------------------------------------------------------------


class Bodies:
    """Reads each request body before its handler runs, and counts the bytes of all bodies in memory."""

    def __init__(self, config: ServerConfig) -> None:
        self._config = config
        self.held = 0

    async def read(self, request: web.Request) -> "Held":
        """After this, `await request.read()` returns the body until `let_go()` is called."""
        return Held(self, request, await self._size(request))

    async def _size(self, request: web.Request) -> int:
        if not request.body_exists:
            return 0
        _check_encoding(request)
        if (request.content_length or 0) > self._config.max_body_bytes:
            raise _too_large(self._config)
        begin = asyncio.get_running_loop().time()
        if request.content.is_eof() and request.content.exception() is None:  # all of it is here already
            return await self._read(request, None, begin)
        try:
            async with asyncio.timeout_at(begin + self._patience(0)) as limit:
                return await self._read(request, limit, begin)
        except TimeoutError:
            seconds = asyncio.get_running_loop().time() - begin
            message = f"Timed out receiving the request body after {seconds:.3g} s."
            raise ApiError(408, message, headers={hdrs.CONNECTION: "close"}) from None
        except web.RequestPayloadError:
            raise ApiError(
                400, "The request body does not match its Content-Length, Transfer-Encoding or Content-Encoding."
            ) from None

    def _patience(self, size: int) -> float:
        """Seconds from the start within which more than `size` bytes must have arrived."""
        return min(max(self._config.header_timeout, size / SLOWEST), self._config.body_timeout)

    async def _read(self, request: web.Request, limit: asyncio.Timeout | None, begin: float) -> int:
        chunks, size, packed = list[bytes](), 0, encoding_of(request) != "identity"
        until = begin + self._patience(0)
        try:
            while chunk := await request.content.readany():
                chunks.append(chunk)
                size += len(chunk)
                self.held += len(chunk)
                due = begin + self._patience(size)
                if limit is not None and due > until:
                    until = due
                    limit.reschedule(due)
                if size > self._config.max_body_bytes:
                    raise _too_large(self._config)
                if packed:  # each piece is unpacked on the event loop, and the next one is already here
                    await asyncio.sleep(0)
                if self.held > MAX_BODIES and size > SMALL_BODY:
                    raise ApiError(
                        503, "Too many large request bodies at once. Retry later.", headers={"Retry-After": "5"}
                    )
        except BaseException:
            self.held -= size
            raise
        request._read_bytes = b"".join(chunks)  # pyright: ignore[reportPrivateUsage]
        return size


def _check_encoding(request: web.Request) -> None:
    """Encodings that aiohttp does not know would be taken for none."""
    encoding = encoding_of(request)
    if encoding not in ENCODINGS:
        raise _unsupported_encoding(one_line(encoding, limit=40))


def encoding_of(request: web.Request) -> str:
    return request.headers.get(hdrs.CONTENT_ENCODING, "identity").strip().lower()


def _unsupported_encoding(name: str) -> ApiError:
    message = f"Unsupported Content-Encoding {name}. Send the body as it is, or with gzip or deflate."
    return ApiError(415, message, headers={hdrs.ACCEPT_ENCODING: "gzip, deflate", hdrs.CONNECTION: "close"})


class Held:
    """A request body in memory."""

    def __init__(self, bodies: Bodies, request: web.Request, size: int) -> None:
        self._bodies, self._request, self._size = bodies, request, size

    def let_go(self) -> None:
        """Release the body's memory. Idempotent."""
        self._bodies.held -= self._size
        self._size = 0
        self._request._read_bytes = b""  # pyright: ignore[reportPrivateUsage]  # where request.read() keeps it


def _too_large(config: ServerConfig) -> ApiError:
    message = f"The request body is larger than {config.max_body_bytes} bytes. "
    message += "Send less per request, or start the server with a higher --max-body-bytes."
    return ApiError(413, message, headers={hdrs.CONNECTION: "close"})
