# SPDX-License-Identifier: Apache-2.0
"""The route type and the list of all routes, which the application, the OpenAPI page and the tests read."""

from collections.abc import Awaitable, Callable
from dataclasses import KW_ONLY, dataclass
from importlib import import_module

from aiohttp import web
from pydantic import BaseModel

from jaxserve.server.http.api_keys import Scope

type Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

# Each has a tuple ROUTES. Imported lazily because they import Route from here.
MODULES = (
    "completions",
    "chat",
    "render",
    "embeddings",
    "score",
    "tokens",
    "models",
    "status",
    "admin",
    "openapi",
    "docs",
)
PAGE = "playground"  # left out by --no-ui


@dataclass(frozen=True)
class Query:
    """A query parameter."""

    name: str
    kind: str  # JSON Schema type
    summary: str


@dataclass(frozen=True)
class Route:
    method: str
    path: str
    handler: Handler
    _: KW_ONLY
    body: type[BaseModel] | None = None
    query: tuple[Query, ...] = ()
    summary: str = ""
    public: bool = False  # needs no API key
    probe: bool = False  # answers HTTP/1.0 without a Host header, which load balancers and monitors send
    scope: Scope = "api"  # that an API key must have

    @property
    def work(self) -> bool:
        """Whether it counts as load, and shutdown waits for it."""
        return self.method == "POST" and not self.public


def all_routes(*, ui: bool) -> tuple[Route, ...]:
    names = (*MODULES, PAGE) if ui else MODULES
    return tuple(route for name in names for route in import_module(f"jaxserve.server.routes.{name}").ROUTES)
