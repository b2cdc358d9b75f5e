# SPDX-License-Identifier: Apache-2.0
"""Reports the unknown fields and query parameters of requests that were served without them.

Each name is logged once; the response lists those of its request in a header.
"""

import logging
from collections.abc import Mapping

from aiohttp import web
from pydantic import BaseModel

from jaxserve.errors import one_line
from jaxserve.server.config import UnknownFields
from jaxserve.server.protocol.base import did_you_mean

LOG = logging.getLogger("jaxserve.server")
HEADER = "x-jaxserve-ignored"
IGNORED = web.RequestKey("ignored", list[str])
MOST_LOGGED = 100  # names, after which no others are logged: clients choose them
MOST_SHOWN = 20  # names in one header
LONGEST = 64  # characters of a name


class IgnoredNames:
    """The names that were ignored so far, by the server's setting."""

    def __init__(self, policy: UnknownFields) -> None:
        self.policy: UnknownFields = policy
        self._logged: set[str] = set()

    def note_fields(self, request: web.Request, names: Mapping[str, type[BaseModel]]) -> None:
        """Report the unknown fields of a body."""
        for path, model in names.items():
            self._note(request, "field", path, did_you_mean(path.rpartition(".")[2], model))

    def note_query(self, request: web.Request, name: str) -> None:
        """Report an unknown query parameter."""
        if self.policy == "warn":
            self._note(request, "query parameter", name, None)

    def _note(self, request: web.Request, kind: str, name: str, hint: str | None) -> None:
        shown = _shown(name)
        request[IGNORED] = [*request.get(IGNORED, ()), shown]
        if shown not in self._logged and len(self._logged) < MOST_LOGGED:
            self._logged.add(shown)
            path = one_line(request.path, limit=80)
            LOG.warning("ignored the unknown %s %s of %s; %s", kind, shown, path, hint or "later ones are not logged")


def header(request: web.BaseRequest) -> str | None:
    """The value of the response's header, if a name was ignored."""
    names: list[str] = request.get(IGNORED, []) if isinstance(request, web.Request) else []
    more = [f"+{len(names) - MOST_SHOWN}"] if len(names) > MOST_SHOWN else []
    return ",".join([*names[:MOST_SHOWN], *more]) or None


def _shown(name: str) -> str:
    """The name as a header can carry it."""
    return "".join(c if c.isascii() and c.isprintable() and c not in ", " else "?" for c in name[:LONGEST]) or "?"
