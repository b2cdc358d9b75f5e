# SPDX-License-Identifier: Apache-2.0
"""What a route is, and all of them. The application, the OpenAPI page and the tests read this one list."""

from collections.abc import Awaitable, Callable
from dataclasses import KW_ONLY, dataclass
from importlib import import_module

from aiohttp import web
from pydantic import BaseModel

type Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

# Each has a tuple ROUTES. Imported when asked for: they import Route from here.
MODULES = ("completions", "chat", "embeddings", "tokens", "models", "status", "admin", "openapi")
PAGE = "playground"  # left out by --no-ui


@dataclass(frozen=True)
class Query:
    """A parameter behind the question mark."""

    name: str
    kind: str  # as JSON Schema calls it
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
    public: bool = False  # answers without a key

    @property
    def work(self) -> bool:
        """Whether a shutdown waits for it, and it counts as load."""
        return self.method == "POST" and not self.public


def all_routes(*, ui: bool) -> tuple[Route, ...]:
    names = (*MODULES, PAGE) if ui else MODULES
    return tuple(route for name in names for route in import_module(f"jaxserve.server.routes.{name}").ROUTES)
