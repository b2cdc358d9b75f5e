# SPDX-License-Identifier: Apache-2.0
"""How the server is: for probes, balancers, Prometheus and people. None of it waits for the engine."""

from typing import Any

import msgspec
from aiohttp import web
from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4

from jaxserve import __version__
from jaxserve.server.routes.table import Route
from jaxserve.server.state import SERVING


def reply(body: Any, *, status: int = 200, headers: dict[str, str] | None = None) -> web.Response:
    return web.Response(
        body=msgspec.json.encode(body), status=status, content_type="application/json", charset="utf-8", headers=headers
    )


async def health(request: web.Request) -> web.StreamResponse:
    """200 when requests are taken. Else 503, and why."""
    serving = request.app[SERVING]
    state = serving.engine.state
    if state.phase == "failed":
        body: dict[str, Any] = {"status": "failed", "detail": "the engine failed, see the log"}
    elif serving.draining:
        body = {"status": "draining", "detail": f"{serving.in_flight} requests in flight"}
    elif serving.front is None:
        body = {"status": "starting", "detail": state.detail, "done": state.done, "total": state.total}
    else:
        return reply({"status": "asleep" if serving.asleep else "ok"})
    return reply(body, status=503, headers={"Retry-After": "1"})


async def live(request: web.Request) -> web.StreamResponse:
    """200 while a restart would help nobody: it starts, serves, drains, or starts its engine again. 503 when the
    engine is gone."""
    serving = request.app[SERVING]
    phase = serving.engine.state.phase
    gone = phase == "failed" or (phase == "stopped" and not serving.draining)
    if gone and not serving.config.restart_engine:
        return reply({"status": "dead"}, status=503)
    return reply({"status": "live"})


async def load(request: web.Request) -> web.StreamResponse:
    return reply({"server_load": request.app[SERVING].in_flight})


async def version(request: web.Request) -> web.StreamResponse:
    return reply({"version": __version__})


async def metrics(request: web.Request) -> web.StreamResponse:
    text = request.app[SERVING].metrics.text()
    return web.Response(body=text, headers={"Content-Type": CONTENT_TYPE_PLAIN_0_0_4})


ROUTES = (
    Route("GET", "/health", health, public=True, summary="Whether requests are taken: 200, or 503 and why."),
    Route("GET", "/live", live, public=True, summary="Whether the process and its engine are alive."),
    Route("GET", "/ping", health, public=True, summary="As /health."),
    Route("POST", "/ping", health, public=True, summary="As /health."),
    Route("GET", "/load", load, summary="How many requests are in flight."),
    Route("GET", "/version", version, summary="The server's version."),
    Route("GET", "/metrics", metrics, summary="Metrics, as Prometheus reads them."),
)
