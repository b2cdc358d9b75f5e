# SPDX-License-Identifier: Apache-2.0
"""Access control: API keys, Host and Origin checks against web pages, and CORS for allowed pages.

With API keys, a foreign page is rejected because it has no key. Without keys, a page open in a browser that can reach
the server could use it: by a cross-origin request to its address, which the Origin check rejects, or by DNS rebinding
of the page's own name to that address, which the Host check rejects.
"""

import re
from urllib.parse import urlsplit

from aiohttp import hdrs, web

from jaxserve.server.config import ServerConfig
from jaxserve.server.errors import ApiError
from jaxserve.server.http.addresses import is_address, is_loopback
from jaxserve.server.http.api_keys import ApiKey, KeyRing, Scope

HOST = re.compile(r"(?:\[[0-9a-fA-F:.]+\]|[A-Za-z0-9._-]+)(?::\d{1,5})?")
LOCAL = frozenset(("localhost", "127.0.0.1", "[::1]"))
PREFLIGHT_SECONDS = "600"
KEY_HEADER = "X-Api-Key"  # sent by clients of Anthropic's API, and accepted beside Authorization


class Access:
    """Decides which routes a request may use, by its API key."""

    def __init__(self, config: ServerConfig, keys: KeyRing) -> None:
        self._config, self._keys = config, keys

    @property
    def administers(self) -> bool:
        """Whether the routes for administration exist: not if any client of another machine could use them."""
        return self._keys.admins or self._config.enable_admin_routes or is_loopback(self._config.host)

    def key_of(self, request: web.Request) -> ApiKey | None:
        """The key that a request sends, if it is a known one."""
        scheme, _, bearer = request.headers.get(hdrs.AUTHORIZATION, "").partition(" ")
        given = [bearer.strip() if scheme.lower() == "bearer" else "", request.headers.get(KEY_HEADER, "").strip()]
        return self._keys.find([each for each in given if each])

    def check(self, key: ApiKey | None, scope: Scope) -> None:
        """Raise a 401, 403 or 404 unless a request with this key may use a route of this scope."""
        protected = self._config.keyed or (scope == "admin" and self._keys.admins)
        if key is None and protected:
            message = "Missing or invalid API key. Send it as: Authorization: Bearer KEY"
            raise ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        if scope == "admin" and not self.administers:
            message = "Not found. To enable this route, start the server with --admin-api-key or --enable-admin-routes."
            raise ApiError(404, message)
        if key is not None and protected and not key.may(self._needed(scope)):
            message = f"This API key has the scope {key.scope}. Use a key with the scope {scope}."
            raise ApiError(403, message, code="insufficient_permissions")

    def _needed(self, scope: Scope) -> Scope:
        """Without keys for administration, any key that may use the model may administer too."""
        return "api" if scope == "admin" and not self._keys.admins else scope


class Origins:
    """The Host names this server accepts, and the web pages that may use it."""

    def __init__(self, config: ServerConfig) -> None:
        self._config = config
        own = LOCAL | {_bare(config.host), *map(str.lower, config.allowed_hosts)}
        self._hosts = None if config.keyed or "*" in config.allowed_hosts else own
        # A page whose name was rebound to this machine sends that name: addresses are safe, wherever they lead.
        self._addresses = not is_loopback(config.host)

    def check(self, request: web.Request, *, host_optional: bool = False) -> None:
        """Raise if the Host header is malformed or not allowed, or if the Origin is not allowed.

        A request without a Host does not come from a browser.
        """
        hosts, host = request.headers.getall(hdrs.HOST, []), request.headers.get(hdrs.HOST, "")
        absent = host_optional and not hosts
        if not absent and (hosts != [host] or (host and not HOST.fullmatch(host))):
            raise ApiError(400, "Malformed Host header." if hosts else "The Host header is missing.")
        if not absent and not self._names_us(_name(host)):
            message = "Host header not allowed. Start the server with --allowed-hosts to allow it, or with an API key."
            raise ApiError(403, message)
        origin = request.headers.get(hdrs.ORIGIN)
        if self._config.keyed or (
            not _embedded(request) if origin is None else self.allows(origin) or _own(origin, host)
        ):
            return
        if origin is None and "*" in self._config.allowed_origins:
            return
        raise ApiError(403, "Origin not allowed. Start the server with --allowed-origins to allow this origin.")

    def _names_us(self, name: str) -> bool:
        return self._hosts is None or name in self._hosts or (self._addresses and is_address(name))

    def allows(self, origin: str) -> bool:
        return "*" in self._config.allowed_origins or origin in self._config.allowed_origins

    def preflight(self, request: web.Request) -> web.Response | None:
        """The response to a CORS preflight request; None for other requests."""
        origin = request.headers.get(hdrs.ORIGIN)
        wanted = request.headers.get(hdrs.ACCESS_CONTROL_REQUEST_METHOD)
        if request.method != hdrs.METH_OPTIONS or origin is None or wanted is None or not self.allows(origin):
            return None
        methods, headers = self._config.allowed_methods, self._config.allowed_headers
        asked = request.headers.get(hdrs.ACCESS_CONTROL_REQUEST_HEADERS, "")
        names = [name.strip() for name in asked.split(",") if name.strip()]
        known = {name.lower() for name in headers}
        if ("*" not in methods and wanted not in methods) or (
            "*" not in headers and not all(name.lower() in known for name in names)
        ):
            message = "Method or header not allowed by CORS. See --allowed-methods and --allowed-headers."
            raise ApiError(403, message)
        answer = web.Response(status=204)
        answer.headers[hdrs.ACCESS_CONTROL_ALLOW_METHODS] = wanted
        if names:
            answer.headers[hdrs.ACCESS_CONTROL_ALLOW_HEADERS] = ", ".join(names)
        answer.headers[hdrs.ACCESS_CONTROL_MAX_AGE] = PREFLIGHT_SECONDS
        return answer

    def mark(self, request: web.BaseRequest, response: web.StreamResponse) -> None:
        """Add the CORS headers that let an allowed page read the response."""
        if not self._config.allowed_origins:
            return
        response.headers.add(hdrs.VARY, "Origin")
        origin = request.headers.get(hdrs.ORIGIN)
        if origin is None or not self.allows(origin):
            return
        response.headers[hdrs.ACCESS_CONTROL_ALLOW_ORIGIN] = "*" if "*" in self._config.allowed_origins else origin
        if self._config.allow_credentials:
            response.headers[hdrs.ACCESS_CONTROL_ALLOW_CREDENTIALS] = "true"


def _embedded(request: web.Request) -> bool:
    """Whether a page of another site loads this as an image, a script or the like, for which browsers send no Origin.
    Following a link is not that."""
    site, mode = (request.headers.get(f"Sec-Fetch-{name}", "") for name in ("Site", "Mode"))
    return site == "cross-site" and mode != "navigate"


def _bare(address: str) -> str:
    """An address as written in a Host header."""
    return f"[{address}]".lower() if ":" in address else address.lower()


def _name(host: str) -> str:
    """The host name in a Host header, without the port."""
    return re.sub(r":\d+$", "", host).lower().rstrip(".")


def _own(origin: str, host: str) -> bool:
    """Whether the origin is this server. The scheme is ignored because a proxy may terminate TLS."""
    try:
        parts = urlsplit(origin)
    except ValueError:
        return False
    default = {"http": ":80", "https": ":443"}.get(parts.scheme, "")
    return parts.scheme in ("http", "https") and host != "" and host.lower() in (parts.netloc, parts.netloc + default)
