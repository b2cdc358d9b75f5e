# SPDX-License-Identifier: Apache-2.0
"""A small client for OpenAI-compatible servers: one request at a time, with whole or streamed responses.

It uses only the standard library, so that commands that talk to a server start at once.
"""

import http.client
import json
import os
import socket
import ssl
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast
from urllib.parse import SplitResult, urlsplit

from jaxserve.config import ConfigError
from jaxserve.errors import JaxserveError, UsageError
from jaxserve.server.http import api_keys
from jaxserve.server.http.addresses import is_loopback

DEFAULT_URL = "http://127.0.0.1:8000/v1"
LOCAL = "http://localhost"  # the URL that requests over a Unix socket have
URL_HELP = "URL of the server, with or without /v1; unix:PATH for a Unix socket."
OPENAI = "api.openai.com"
KEY_HELP = (
    "API key of the server (default: JAXSERVE_API_KEY, or OPENAI_API_KEY for OpenAI and servers on this machine)."
)
KEY_FILE_HELP = "File whose first line is the API key of the server, so that it does not show in the list of processes."
LOG = "see the server log"
HINTS = {
    400: "change the request",
    401: f"set --api-key, --api-key-file or JAXSERVE_API_KEY (OPENAI_API_KEY goes only to {OPENAI} and this machine)",
    403: "set --api-key, or allow this host on the server",
    404: "check --url and --model-name",
    413: "send a smaller request",
    429: "a rate limit is reached; try again later",
    503: "the server is starting, stopping or overloaded; try again later",
}


def key_for(url: str, *, key: str | None, file: str | None) -> str | None:
    """The API key to send to a server: the given one, the first of a file, or JAXSERVE_API_KEY. OPENAI_API_KEY is sent
    only to OpenAI, encrypted, and to this machine: other servers must not learn it."""
    if key is not None and file is not None:
        raise UsageError("--api-key and --api-key-file are both set", "set only one of them")
    if key is not None:
        return key
    if file is not None:
        lines = _usage(lambda: api_keys.lines_of(file))
        if not lines:
            raise UsageError(f"{file} contains no key", api_keys.FORM)
        return lines[0][1][0]
    if own := os.environ.get("JAXSERVE_API_KEY", "").partition(",")[0].strip():
        return own
    parts = _split(LOCAL if unix_socket(url) else url)
    trusted = parts.hostname is not None and is_loopback(parts.hostname)
    if trusted or (parts.hostname == OPENAI and parts.scheme == "https"):
        return os.environ.get("OPENAI_API_KEY") or None
    return None


def unix_socket(url: str) -> str | None:
    """The path of a URL such as unix:/run/jaxserve.sock, or None for any other."""
    scheme, colon, path = url.partition(":")
    if scheme != "unix" or not colon:
        return None
    path = path.removeprefix("//")
    if not path:
        raise UsageError(f"{url!r} has no path", "use a URL such as unix:/run/jaxserve.sock")
    return str(Path(path).expanduser())


def _split(url: str) -> SplitResult:
    try:
        parts = urlsplit(url if "//" in url else f"http://{url}")
        _ = parts.port  # raises if it is not a number
    except ValueError:
        parts = urlsplit("")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UsageError(f"{url!r} is not a server URL", f"use a URL such as {DEFAULT_URL} or unix:/run/jaxserve.sock")
    return parts


def _usage[T](make: Callable[[], T]) -> T:
    try:
        return make()
    except ConfigError as error:
        raise UsageError(error.problem, error.hint) from None


class ServerError(JaxserveError):
    """A request that the server rejected or failed."""

    def __init__(self, problem: str, hint: str, *, status: int | None = None) -> None:
        super().__init__(problem, hint)
        self.status = status


class Client:
    def __init__(self, url: str = DEFAULT_URL, *, api_key: str | None = None, timeout: float = 600) -> None:
        """`url` may end in /v1, or name a Unix socket. A request fails after `timeout` seconds without data."""
        self.socket = unix_socket(url)
        parts = _split(LOCAL if self.socket else url)
        self._host, self._port = parts.hostname or "", parts.port
        self._secure, self._timeout = parts.scheme == "https", timeout
        self._path = parts.path.rstrip("/").removesuffix("/v1")
        self.root = f"{parts.scheme}://{parts.netloc}{self._path}"
        self.name = f"unix:{self.socket}" if self.socket else self.root  # for messages
        if api_key is not None and not (api_key.isascii() and api_key.isprintable()):
            problem = "the API key contains characters that an HTTP header cannot"
            raise UsageError(problem, "check --api-key and --api-key-file")
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}

    def get(self, path: str) -> Any:
        with self._asked("GET", path, None) as response:
            return self._content(response)

    def post(self, path: str, body: Any = None) -> Any:
        """The decoded JSON response, or None if it is empty."""
        with self._asked("POST", path, body) as response:
            return self._content(response)

    def stream(self, path: str, body: dict[str, Any]) -> Generator[dict[str, Any]]:
        """The events of a streamed response. Closing the generator ends the request."""
        with self._asked("POST", path, {**body, "stream": True}) as response:
            while line := self._read(response.readline):
                name, _, data = line.strip().partition(b":")
                if name != b"data":
                    continue
                if data.strip() == b"[DONE]":
                    return
                event = self._parsed(data)
                if isinstance(event, dict) and "error" in event:
                    problem, hint = _problem_and_hint(_message(event) or "error", LOG)
                    raise ServerError(f"the server replied: {problem}", hint)
                yield cast("dict[str, Any]", event)
            raise ServerError("the response ended early", LOG)

    def model(self) -> str:
        """The first model of the server."""
        found: Any = self.get("/v1/models")
        try:
            return str(found["data"][0]["id"])
        except (KeyError, IndexError, TypeError):
            raise ServerError(f"{self.name} lists no models", "set --model-name") from None

    @contextmanager
    def _asked(self, method: str, path: str, body: Any) -> Generator[http.client.HTTPResponse]:
        connection = self._connection()
        data = None if body is None else json.dumps(body).encode()
        headers = {**self._headers, **({"Content-Type": "application/json"} if data is not None else {})}
        try:
            response = self._read(lambda: _answer(connection, method, self._path + path, data, headers))
            if response.status >= 400:
                said = _message(self._parsed(self._read(response.read), strict=False))
                problem, hint = _problem_and_hint(said, HINTS.get(response.status, LOG))
                nothing = f"{path} returned {response.status} {response.reason}"
                raise ServerError(f"the server replied: {problem}" if said else nothing, hint, status=response.status)
            yield response
        finally:
            connection.close()

    def _connection(self) -> http.client.HTTPConnection:
        if self.socket is not None:
            return _UnixConnection(self.socket, timeout=self._timeout)
        kind = http.client.HTTPSConnection if self._secure else http.client.HTTPConnection
        return kind(self._host, self._port, timeout=self._timeout)

    def _read[T](self, read: Any) -> Any:
        try:
            return read()
        except (ConnectionRefusedError, FileNotFoundError):  # of a Unix socket
            hint = "start a server with `jaxserve run`, or set --url"
            raise ServerError(f"cannot connect to {self.name}", hint) from None
        except TimeoutError:
            raise ServerError(f"no data from {self.name} for {self._timeout:g} s", LOG) from None
        except ssl.SSLError as error:
            raise ServerError(
                f"the TLS connection to {self.name} failed: {error.reason or error}", "check --url"
            ) from None
        except (OSError, http.client.HTTPException, ValueError) as error:
            why = str(error) or type(error).__name__
            raise ServerError(f"the connection to {self.name} failed: {why}", "check --url") from None

    def _content(self, response: http.client.HTTPResponse) -> Any:
        data = self._read(response.read)
        return self._parsed(data) if data.strip() else None

    def _parsed(self, data: bytes, *, strict: bool = True) -> Any:
        try:
            return json.loads(data)
        except (ValueError, RecursionError):
            if not strict:
                return None
            raise ServerError(f"the response from {self.name} is not JSON", "check --url") from None


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str, *, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def _answer(connection: http.client.HTTPConnection, method: str, path: str, data: bytes | None, headers: Any) -> Any:
    connection.request(method, path, data, headers)
    return connection.getresponse()


def _message(content: Any) -> str:
    try:
        error = content["error"]
        text = error if isinstance(error, str) else error["message"]
    except (KeyError, TypeError):
        return ""
    return text if isinstance(text, str) else ""


def _problem_and_hint(message: str, usual: str) -> tuple[str, str]:
    """Problem and hint. If there are several sentences, the last one says what to do, more precisely than a status."""
    problem, end, hint = message.rstrip(" .").rpartition(". ")
    quoted = hint.count("`") % 2 or hint.count('"') % 2  # that sentence end is inside a quotation
    return (problem, hint) if end and problem and hint and not quoted else (message, usual)
