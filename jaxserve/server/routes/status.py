# SPDX-License-Identifier: Apache-2.0
"""Health, load, version and metrics. None of these routes waits for the engine."""

from typing import Any

import msgspec
from aiohttp import web
from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4

from jaxserve import __version__
from jaxserve.server.routes.table import Route
from jaxserve.server.state import SERVING
from jaxserve.types.metrics import EngineMetrics


def reply(body: Any, *, status: int = 200, headers: dict[str, str] | None = None) -> web.Response:
    return web.Response(
        body=msgspec.json.encode(body), status=status, content_type="application/json", charset="utf-8", headers=headers
    )


async def health(request: web.Request) -> web.StreamResponse:
    """200 if requests are accepted, otherwise 503 with the reason. With the progress while programs are compiled."""
    serving = request.app[SERVING]
    state = serving.engine.state
    if state.phase == "failed":
        body: dict[str, Any] = {"status": "failed", "detail": "the engine failed; see the server log"}
    elif serving.draining:
        body = {"status": "draining", "detail": f"requests in flight: {serving.in_flight}"}
    elif serving.client is None:
        body = {"status": "starting", "detail": state.detail, "done": state.done, "total": state.total}
    elif serving.asleep:
        body = {"status": "asleep", "detail": "wake the engine with POST /wake_up"}
    else:
        return reply({"status": "ok", **_compiling(serving.engine.stats)})
    return reply(body, status=503, headers={"Retry-After": "1"})


def _compiling(stats: EngineMetrics | None) -> dict[str, Any]:
    if stats is None or not stats.programs_pending:
        return {}
    done, total = stats.programs_compiled, stats.programs_compiled + stats.programs_pending
    return {"detail": f"compiling {done}/{total} in the background", "done": done, "total": total}


async def live(request: web.Request) -> web.StreamResponse:
    """Liveness: 200 while the server starts, serves, drains or restarts its engine; 503 once the engine is gone."""
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
    Route(
        "GET",
        "/health",
        health,
        public=True,
        probe=True,
        summary="Readiness: 200 if requests are accepted, otherwise 503 with the reason.",
    ),
    Route(
        "GET",
        "/live",
        live,
        public=True,
        probe=True,
        summary="Liveness: 503 once the engine is gone and will not be restarted.",
    ),
    Route("GET", "/ping", health, public=True, probe=True, summary="Same as /health."),
    Route("POST", "/ping", health, public=True, probe=True, summary="Same as /health."),
    Route("GET", "/load", load, scope="metrics", summary="Number of requests in flight."),
    Route("GET", "/version", version, scope="metrics", summary="Server version."),
    Route("GET", "/metrics", metrics, probe=True, scope="metrics", summary="Prometheus metrics."),
)
