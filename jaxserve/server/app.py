# SPDX-License-Identifier: Apache-2.0
"""The aiohttp application: its routes and the middleware around each handler.

observe (id, load, log, metrics) -> faults (errors as JSON) -> admit (origin, key, readiness, body) -> handler
"""

import asyncio
import logging
import os
import time
from collections.abc import Generator
from contextlib import contextmanager
from typing import cast

from aiohttp import hdrs, web
from aiohttp.typedefs import Middleware

from jaxserve.errors import EngineError, one_line
from jaxserve.server import unknown_fields
from jaxserve.server.errors import ApiError, as_api_error, bad_request
from jaxserve.server.http.api_keys import ApiKey
from jaxserve.server.http.auth import Origins
from jaxserve.server.http.guard import Bodies, Connection
from jaxserve.server.http.limits import UNSET
from jaxserve.server.observe import logs
from jaxserve.server.observe.prometheus import UNKNOWN
from jaxserve.server.observe.request_record import RequestRecord
from jaxserve.server.observe.traces import PARENT
from jaxserve.server.routes.table import Handler, Route, all_routes
from jaxserve.server.state import GRANT, HELD, RECORD, SERVING, TRACE, Serving

LEFT = 499  # status in logs and metrics when the client disconnects before the response
MAX_ID = 128
ID_HEADER = "X-Request-Id"
_RANDOM: list[bytes] = []  # for the ids of the next requests


def make_app(serving: Serving) -> web.Application:
    config = serving.config
    routes = all_routes(ui=not config.no_ui)
    table = {(route.method, path): route for route in routes for path in _paths(route, config.root_path)}
    origins = Origins(config)
    app = web.Application(
        middlewares=[
            _observe(serving, table),
            _faults,
            _admit(serving, table, origins=origins, bodies=Bodies(config)),
        ],
        client_max_size=config.max_body_bytes,
    )
    app[SERVING] = serving
    for (method, path), route in table.items():
        app.router.add_route(method, path, route.handler, expect_handler=_expect)
        if method == hdrs.METH_GET:
            app.router.add_route(hdrs.METH_HEAD, path, route.handler)

    async def mark(request: web.Request, response: web.StreamResponse) -> None:
        origins.mark(request, response)
        response.headers[hdrs.SERVER] = "jaxserve"
        response.headers.setdefault("X-Content-Type-Options", "nosniff")
        record = request.get(RECORD)
        if config.enable_request_id_headers and record is not None:
            response.headers[ID_HEADER] = record.id
        if (trace := request.get(TRACE)) is not None:
            response.headers[PARENT] = trace.header
        if (grant := request.get(GRANT)) is not None:
            response.headers.update(grant.headers())
        if ignored := unknown_fields.header(request):
            response.headers[unknown_fields.HEADER] = ignored
        if serving.draining or not response.keep_alive:
            response.force_close()
            response.headers[hdrs.CONNECTION] = "close"

    app.on_response_prepare.append(mark)
    return app


def _paths(route: Route, root: str) -> tuple[str, ...]:
    """The paths of a route: with and without the proxy's prefix, and with a trailing slash, which does no harm."""
    path = route.path
    return tuple(dict.fromkeys(form for start in ("", root) for form in (start + path, f"{start}{path.rstrip('/')}/")))


def _route(table: dict[tuple[str, str], Route], request: web.Request) -> Route | None:
    """The route that aiohttp matched, never one guessed from the path."""
    resource = request.match_info.route.resource
    method = hdrs.METH_GET if request.method == hdrs.METH_HEAD else request.method
    return None if resource is None else table.get((method, resource.canonical))


def _observe(serving: Serving, table: dict[tuple[str, str], Route]) -> Middleware:
    @web.middleware
    async def observe(request: web.Request, handler: Handler) -> web.StreamResponse:
        record = request[RECORD] = RequestRecord(_request_id(request), time.monotonic())
        cast(Connection, request.protocol).begin(request)
        route = _route(table, request)
        status = LEFT
        if serving.tracer is not None and route is not None and route.work:
            request[TRACE] = serving.tracer.begin(request.headers, record)
        try:
            response = await handler(request)
            status = response.status
            return response
        finally:
            if (trace := request.get(TRACE)) is not None:
                trace.end(record, model=next(iter(serving.model_names), ""), status=status)
            name = UNKNOWN if route is None else route.path
            serving.metrics.answered(request.method, name, status, time.monotonic() - record.arrival)
            if record.key is not None and route is not None and route.work:
                serving.metrics.served_key(record, status)
            level = logging.WARNING if status in (500, 504) else logging.INFO if route and route.work else logging.DEBUG
            shown = request.rel_url.raw_path if route is None else route.path
            if name not in serving.config.disable_access_log_for:
                logs.request_line(
                    record, method=request.method, path=shown, status=status, config=serving.config, level=level
                )

    return observe


def _request_id(request: web.Request) -> str:
    """The client's X-Request-Id, or a new one. Only correlates logs; it grants no access."""
    sent = request.headers.get(ID_HEADER, "")
    good = 0 < len(sent) <= MAX_ID and sent.isascii() and sent.isprintable()
    return sent if good else _new_id()


def _new_id() -> str:
    """32 random hexadecimal digits. The system is asked for many at a time: each call may hand Python's lock to another
    thread."""
    if not _RANDOM:
        data = os.urandom(16 * 256)
        _RANDOM.extend(data[begin : begin + 16] for begin in range(0, len(data), 16))
    return _RANDOM.pop().hex()


@web.middleware
async def _faults(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except asyncio.CancelledError:
        raise
    except Exception as error:
        if isinstance(error, ConnectionError) or request.writer.output_size > 0:
            raise  # the client is gone or the response has begun: aiohttp closes the connection
        fault = as_api_error(error)
        # The engine logs its own failure once; do not repeat it for each request that it lost.
        if fault.status >= 500 and not isinstance(error, ApiError | EngineError | web.HTTPException):
            logs.LOG.error("%s %s failed", request.method, one_line(request.path, limit=80), exc_info=error)
        request[RECORD].error = fault.message
        response = fault.response()
        if response.headers.get(hdrs.CONNECTION) == "close":
            response.force_close()
        return response


def _admit(serving: Serving, table: dict[tuple[str, str], Route], *, origins: Origins, bodies: Bodies) -> Middleware:
    @web.middleware
    async def admit(request: web.Request, handler: Handler) -> web.StreamResponse:
        route, key = _route(table, request), None
        origins.check(request, host_optional=route is not None and route.probe and request.version < (1, 1))
        preflight = origins.preflight(request)
        if preflight is not None:
            return preflight
        if not (route is not None and route.public):
            key = serving.access.key_of(request)
            request[RECORD].key = None if key is None else key.name
            serving.access.check(key, "api" if route is None else route.scope)
        if route is not None and not route.public:
            _check_query(serving, request, route)
        if route is None or not route.work:
            return await handler(request)
        try:
            serving.check_engine()
        except ApiError:
            serving.metrics.rejections["unavailable"] += 1
            raise
        if route.scope != "admin":
            serving.check_awake()  # before the request counts against a rate limit
        with _granted(serving, request, route, key), serving.working():
            await serving.entrance.enter()
            held = request[HELD] = await bodies.read(request)
            try:
                return await handler(request)
            finally:
                held.let_go()

    return admit


@contextmanager
def _granted(serving: Serving, request: web.Request, route: Route, key: ApiKey | None) -> Generator[None]:
    """Count a request that uses the model against the limits of its key."""
    if route.scope == "admin":
        yield
        return
    name, limit = (None, UNSET) if key is None else (key.name, key.limit)
    grant = request[GRANT] = serving.limiter.begin(name, limit)
    try:
        yield
    finally:
        grant.end()


def _check_query(serving: Serving, request: web.Request, route: Route) -> None:
    """Report or refuse unknown query parameters."""
    known = [query.name for query in route.query]
    for name in request.query:
        if name not in known:
            if serving.ignored.policy != "refuse":
                serving.ignored.note_query(request, name)
                continue
            hint = f"known parameters: {', '.join(known)}" if known else "this route takes none"
            raise bad_request(None, f"unknown query parameter {one_line(name, limit=80)!r}", hint)


async def _expect(request: web.Request) -> web.StreamResponse | None:
    """Answer Expect: 100-continue, which a client sends before its body."""
    if request.headers.get(hdrs.EXPECT, "").lower() != "100-continue":
        return ApiError(417, "Unsupported Expect header. Only 100-continue is supported.").response()
    if request.version >= (1, 1):
        await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        request.writer.output_size = 0  # the response itself has not begun
    return None
