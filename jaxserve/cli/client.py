# SPDX-License-Identifier: Apache-2.0
"""A small client of servers that speak OpenAI's API: one request at a time, answers whole or as they come.

Standard library alone, so that a command that talks to a server starts at once.
"""

import http.client
import json
import os
import ssl
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, cast
from urllib.parse import urlsplit

from jaxserve.errors import JaxserveError, UsageError

DEFAULT_URL = "http://127.0.0.1:8000/v1"
LOG = "see the server's log"
HINTS = {
    400: "change the request",
    401: "give --api-key",
    403: "give --api-key, or have the server allow this host",
    404: "check --url and --model-name",
    413: "send less",
    429: "it has too much to do: try again later",
    503: "it is loading, ending or has too much to do: try again later",
}


def key_of_environment() -> str | None:
    """The key to send where none is given."""
    own = os.environ.get("JAXSERVE_API_KEY", "").partition(",")[0].strip()
    return own or os.environ.get("OPENAI_API_KEY") or None


class ServerError(JaxserveError):
    """What a server refused, or failed at."""

    def __init__(self, problem: str, hint: str, *, status: int | None = None) -> None:
        super().__init__(problem, hint)
        self.status = status


class Client:
    def __init__(self, url: str = DEFAULT_URL, *, api_key: str | None = None, timeout: float = 600) -> None:
        """`url` is that of the server, with /v1 or without; `timeout` seconds without a byte end a request."""
        wrong = UsageError(f"{url!r} is no URL of a server", f"give one such as {DEFAULT_URL}")
        try:
            parts = urlsplit(url if "//" in url else f"http://{url}")
            self._host, self._port = parts.hostname or "", parts.port
        except ValueError:
            raise wrong from None
        if parts.scheme not in ("http", "https") or not self._host:
            raise wrong
        self._secure, self._timeout = parts.scheme == "https", timeout
        self._path = parts.path.rstrip("/").removesuffix("/v1")
        self.root = f"{parts.scheme}://{parts.netloc}{self._path}"
        if api_key is not None and not (api_key.isascii() and api_key.isprintable()):
            raise UsageError("the API key has characters that no header can carry", "check --api-key")
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}

    def get(self, path: str) -> Any:
        with self._asked("GET", path, None) as response:
            return self._content(response)

    def post(self, path: str, body: Any = None) -> Any:
        """The answer, as JSON where it is JSON; None where it is empty."""
        with self._asked("POST", path, body) as response:
            return self._content(response)

    def stream(self, path: str, body: dict[str, Any]) -> Generator[dict[str, Any]]:
        """The events of a streamed answer. Closing the generator ends the request."""
        with self._asked("POST", path, {**body, "stream": True}) as response:
            while line := self._read(response.readline):
                name, _, data = line.strip().partition(b":")
                if name != b"data":
                    continue
                if data.strip() == b"[DONE]":
                    return
                event = self._parsed(data)
                if isinstance(event, dict) and "error" in event:
                    problem, hint = _told(_message(event) or "error", LOG)
                    raise ServerError(f"the server says: {problem}", hint)
                yield cast("dict[str, Any]", event)
            raise ServerError("the answer broke off", LOG)

    def model(self) -> str:
        """The first model that the server has."""
        found: Any = self.get("/v1/models")
        try:
            return str(found["data"][0]["id"])
        except (KeyError, IndexError, TypeError):
            raise ServerError(f"{self.root} names no model", "give --model-name") from None

    @contextmanager
    def _asked(self, method: str, path: str, body: Any) -> Generator[http.client.HTTPResponse]:
        kind = http.client.HTTPSConnection if self._secure else http.client.HTTPConnection
        connection = kind(self._host, self._port, timeout=self._timeout)
        data = None if body is None else json.dumps(body).encode()
        headers = {**self._headers, **({"Content-Type": "application/json"} if data is not None else {})}
        try:
            response = self._read(lambda: _answer(connection, method, self._path + path, data, headers))
            if response.status >= 400:
                said = _message(self._parsed(self._read(response.read), strict=False))
                problem, hint = _told(said, HINTS.get(response.status, LOG))
                nothing = f"{path} answers {response.status} {response.reason}"
                raise ServerError(f"the server says: {problem}" if said else nothing, hint, status=response.status)
            yield response
        finally:
            connection.close()

    def _read[T](self, read: Any) -> Any:
        try:
            return read()
        except ConnectionRefusedError:
            hint = "start a server with `jaxserve run`, or give the --url of one"
            raise ServerError(f"nothing answers at {self.root}", hint) from None
        except TimeoutError:
            raise ServerError(f"{self.root} is silent for {self._timeout:g} s", LOG) from None
        except ssl.SSLError as error:
            raise ServerError(f"no secure connection to {self.root}: {error.reason or error}", "check --url") from None
        except (OSError, http.client.HTTPException, ValueError) as error:
            why = str(error) or type(error).__name__
            raise ServerError(f"the connection to {self.root} failed: {why}", "check --url") from None

    def _content(self, response: http.client.HTTPResponse) -> Any:
        data = self._read(response.read)
        return self._parsed(data) if data.strip() else None

    def _parsed(self, data: bytes, *, strict: bool = True) -> Any:
        try:
            return json.loads(data)
        except (ValueError, RecursionError):
            if not strict:
                return None
            raise ServerError(f"{self.root} answers with something else than JSON", "check --url") from None


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


def _told(message: str, usual: str) -> tuple[str, str]:
    """Problem and hint. Of several sentences the last says what to do, better than a status can."""
    problem, end, hint = message.rstrip(" .").rpartition(". ")
    quoted = hint.count("`") % 2 or hint.count('"') % 2  # the end of a sentence in what is quoted
    return (problem, hint) if end and problem and hint and not quoted else (message, usual)
