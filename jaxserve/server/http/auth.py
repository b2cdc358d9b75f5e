# SPDX-License-Identifier: Apache-2.0
"""Access control: API keys, Host and Origin checks against web pages, and CORS for allowed pages.

With API keys, a foreign page is rejected because it has no key. Without keys, a page open in a browser on this machine
could reach the server: by a cross-origin request to 127.0.0.1, which the Origin check rejects, or by DNS rebinding of
its own name to 127.0.0.1, which the Host check rejects.
"""

import hashlib
import hmac
import ipaddress
import re
from collections.abc import Collection
from urllib.parse import urlsplit

from aiohttp import hdrs, web

from jaxserve.server.config import ServerConfig
from jaxserve.server.errors import ApiError

HOST = re.compile(r"(?:\[[0-9a-fA-F:.]+\]|[A-Za-z0-9._-]+)(?::\d{1,5})?")
LOCAL = frozenset(("localhost", "127.0.0.1", "[::1]"))
PREFLIGHT_SECONDS = "600"
KEY_HEADER = "X-Api-Key"  # sent by clients of Anthropic's API, and accepted beside Authorization


class Keys:
    def __init__(self, keys: Collection[str]) -> None:
        self._digests = [_digest(key) for key in keys]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def check(self, request: web.Request) -> None:
        """Raise a 401 unless the request has one of the keys. Takes constant time for any key, valid or not."""
        scheme, _, bearer = request.headers.get(hdrs.AUTHORIZATION, "").partition(" ")
        given = [bearer.strip() if scheme.lower() == "bearer" else "", request.headers.get(KEY_HEADER, "").strip()]
        digests = [_digest(key) for key in given if key]
        known = [hmac.compare_digest(digest, own) for digest in digests for own in self._digests]
        if not any(known):
            message = "Missing or invalid API key. Send it as: Authorization: Bearer KEY"
            raise ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


def _digest(key: str) -> bytes:
    # aiohttp decodes header bytes that are not UTF-8 to surrogates.
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()


def is_loopback(address: str) -> bool:
    if address == "localhost":
        return True
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False


class Origins:
    """The Host names this server accepts, and the web pages that may use it."""

    def __init__(self, config: ServerConfig) -> None:
        self._config = config
        own = LOCAL | {_bare(config.host), *map(str.lower, config.allowed_hosts)}
        # On a non-loopback address the valid host names are unknown; a start-up warning recommends API keys there.
        checks = not config.api_key and (is_loopback(config.host) or config.allowed_hosts)
        self._hosts = own if checks and "*" not in config.allowed_hosts else None

    def check(self, request: web.Request) -> None:
        """Raise if the Host header is malformed or not allowed, or if the Origin is not allowed."""
        host = request.headers.get(hdrs.HOST, "")
        if request.headers.getall(hdrs.HOST, []) != [host] or (host and not HOST.fullmatch(host)):
            raise ApiError(400, "Malformed Host header.")
        if self._hosts is not None and _name(host) not in self._hosts:
            raise ApiError(403, "Host header not allowed. Start the server with --allowed-hosts to allow this host.")
        origin = request.headers.get(hdrs.ORIGIN)
        if origin is None or self._config.api_key or self.allows(origin) or _own(origin, host):
            return
        raise ApiError(403, "Origin not allowed. Start the server with --allowed-origins to allow this origin.")

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
