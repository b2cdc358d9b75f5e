# SPDX-License-Identifier: Apache-2.0
"""GET /openapi.json: every route with its body's schema and possible responses, as OpenAPI 3.1."""

import functools
from collections.abc import Iterable
from typing import Any

from aiohttp import web
from pydantic.json_schema import models_json_schema

from jaxserve import __version__
from jaxserve.server.answers.replies import encode
from jaxserve.server.routes.table import Query, Route, all_routes
from jaxserve.server.state import SERVING

TEMPLATE = "#/components/schemas/{model}"
ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["integer", "string", "null"]},
            },
        }
    },
}
STATUSES = {
    400: "Invalid request; param names the field.",
    401: "Missing or invalid API key.",
    403: "The Host or Origin header or the API key is not allowed here, or the feature is disabled.",
    404: "Unknown model.",
    408: "Timeout while receiving the body.",
    409: "Not possible in the engine's current state.",
    413: "Request body too large.",
    429: "A rate limit of the API key is reached. Retry after Retry-After seconds.",
    500: "Internal error of the engine or the server.",
    503: "Unavailable: loading, overloaded, asleep or shutting down. Retry after Retry-After seconds.",
    504: "The request's deadline has passed.",
}
GENERATING = ("/v1/completions", "/v1/chat/completions", "/v1/embeddings")
STREAMING = ("/v1/completions", "/v1/chat/completions")
ANSWERS = {"/metrics": "text/plain", "/": "text/html", "/docs": "text/html"}


async def page(request: web.Request) -> web.Response:
    serving = request.app[SERVING]
    config, admin = serving.config, serving.access.administers
    body = _document(ui=not config.no_ui, admin=admin, root=config.root_path)
    return web.Response(body=body, content_type="application/json", charset="utf-8")


@functools.cache
def _document(*, ui: bool, admin: bool, root: str) -> bytes:
    return encode(shown_document(ui=ui, admin=admin, root=root))


def shown_document(*, ui: bool, admin: bool, root: str) -> dict[str, Any]:
    """The document of a server with or without its page, the routes for administration and a proxy's prefix."""
    shown = document(route for route in all_routes(ui=ui) if admin or route.scope != "admin")
    return shown | ({"servers": [{"url": root}]} if root else {})


def document(routes: Iterable[Route]) -> dict[str, Any]:
    routes = [route for route in routes if not route.path.startswith("/static/")]
    bodies = {route.body: None for route in routes if route.body is not None}
    references, schemas = models_json_schema([(body, "validation") for body in bodies], ref_template=TEMPLATE)
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        schema = None if route.body is None else references[route.body, "validation"]
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route, schema)
    return {
        "openapi": "3.1.0",
        "info": {"title": "jaxserve", "version": __version__},
        "paths": paths,
        "components": {
            "schemas": {**schemas.get("$defs", {}), "Error": ERROR},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _operation(route: Route, schema: dict[str, Any] | None) -> dict[str, Any]:
    operation: dict[str, Any] = {"summary": route.summary, "operationId": _name(route)}
    names = [part[1:-1] for part in route.path.split("/") if part.startswith("{")]
    parameters = [_parameter(Query(name, "string", ""), "path") for name in names]
    parameters += [_parameter(query, "query") for query in route.query]
    if parameters:
        operation["parameters"] = parameters
    if schema is not None:
        content = {"application/json": {"schema": schema}}
        operation["requestBody"] = {"required": True, "content": content}
    if not route.public:
        operation["security"] = [{"key": []}]
    operation["responses"] = _responses(route)
    return operation


def _name(route: Route) -> str:
    words = [word.strip("{}") for word in route.path.split("/") if word]
    return "_".join([route.method.lower(), *words]).replace(".", "_")


def _parameter(query: Query, where: str) -> dict[str, Any]:
    shape: dict[str, Any] = {"name": query.name, "in": where, "schema": {"type": query.kind}}
    if query.summary:
        shape["description"] = query.summary
    return {**shape, "required": True} if where == "path" else shape


def _responses(route: Route) -> dict[str, Any]:
    kinds = [ANSWERS.get(route.path, "application/json"), *(["text/event-stream"] if route.path in STREAMING else [])]
    found: dict[str, Any] = {"200": {"description": "Done.", "content": {kind: {} for kind in kinds}}}
    error = {"application/json": {"schema": {"$ref": TEMPLATE.format(model="Error")}}}
    for status in sorted(_statuses(route)):
        found[str(status)] = {"description": STATUSES[status], "content": error}
    return found


def _statuses(route: Route) -> set[int]:
    found = {400, 403}
    if not route.public:
        found.add(401)
    if route.path in ("/health", "/ping", "/live"):
        found.add(503)
    if "{" in route.path:
        found.add(404)
    if route.work:
        found |= {408, 413, 500, 503}
        found |= {404} if route.path.startswith("/v1/") or "tokenize" in route.path else {409}
        if route.scope == "api":
            found.add(429)
    if route.path in GENERATING:
        found.add(504)
    return found


ROUTES = (Route("GET", "/openapi.json", page, summary="This document."),)
