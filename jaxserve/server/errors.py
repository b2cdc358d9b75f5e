# SPDX-License-Identifier: Apache-2.0
"""Errors as clients see them: a status and {"error": {message, type, param, code}}, with nothing of this machine in it.

Knows the errors of the house and of aiohttp; not who raises them, nor how they travel.
"""

import re
from collections.abc import Mapping

import msgspec
from aiohttp import web

from jaxserve.errors import EngineError, JaxserveError, OverloadedError, RequestError

TYPES = {
    400: "BadRequestError",
    401: "AuthenticationError",
    403: "PermissionDeniedError",
    404: "NotFoundError",
    405: "MethodNotAllowedError",
    408: "RequestTimeoutError",
    413: "RequestTooLargeError",
    415: "UnsupportedMediaTypeError",
    421: "MisdirectedRequestError",
    429: "RateLimitError",
    500: "InternalServerError",
    501: "NotImplementedError",
    503: "ServiceUnavailableError",
    504: "TimeoutError",
}
MESSAGES = {
    404: "There is nothing at this address.",
    405: "This address does not take this method.",
    413: "The request is too large.",
    500: "The server failed on this request. Its log says why.",
}
SHUT_DOWN = "The server was shut down before this answer was complete."
ENGINE_FAILED = "The engine failed, and this request is lost. The server's log says why."
TIMED_OUT = "The request took longer than it may."
RETRY_AFTER = {"Retry-After": "1"}

# Words that a sentence of ours begins with, and no name of a field.
OPENINGS = frozenset(
    (
        *("a", "an", "the", "this", "of", "no", "every", "both", "there", "unknown", "did", "give", "leave", "send"),
        *("set", "say", "start", "ask", "correct", "lower", "raise", "shorten", "make", "try", "allow", "drop", "use"),
        *("requests", "cannot", "neither"),
    )
)

# What would tell of this machine: addresses in memory, files, stack traces. Our own routes have a slash in them too.
PRIVATE = re.compile(
    r"0x[0-9a-fA-F]{6,}|(?:(?<!\w)/(?!v1/)(?:[\w.+-]+/)+[\w.+-]*)|File \"[^\"]*\"?|Traceback.*", re.DOTALL
)


class ApiError(Exception):
    """What a client is told in place of an answer."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str | None = None,
        param: str | None = None,
        code: int | str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param = status, message, param
        self.type = type or TYPES.get(status, TYPES[400 if status < 500 else 500])
        self.code = status if code is None else code
        self.headers = dict(headers or {})

    def body(self) -> bytes:
        error = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return msgspec.json.encode({"error": error})

    def response(self) -> web.Response:
        return web.Response(
            body=self.body(), status=self.status, headers=self.headers, content_type="application/json", charset="utf-8"
        )


def bad_request(param: str | None, problem: str, hint: str) -> ApiError:
    return ApiError(400, sentence(problem, hint), param=param)


def sentence(problem: str, hint: str) -> str:
    """The house's `problem; hint` for people: two sentences."""
    return scrubbed(f"{_sentence(problem)} {_sentence(hint, names=False)}")


def _sentence(text: str, *, names: bool = True) -> str:
    """`names`: its first word may be a field's name, which stays as it is written."""
    first = text.split(" ", 1)[0]
    if first in OPENINGS or (not names and first.rstrip(",:").isalpha()):
        text = text[:1].upper() + text[1:]
    return text if text.endswith(("?", ".", "…")) else f"{text}."


def scrubbed(text: str) -> str:
    return PRIVATE.sub("…", text)


def as_api_error(error: BaseException) -> ApiError:
    """What to tell of any error. Of those that are not the client's it is a 500 that says nothing: log them."""
    match error:
        case ApiError():
            return error
        case OverloadedError():
            message = sentence(error.problem, error.hint)
            return ApiError(error.status, message, param=None, headers=RETRY_AFTER)
        case RequestError():
            return ApiError(error.status, sentence(error.problem, error.hint), param=error.field)
        case EngineError():
            return ApiError(500, ENGINE_FAILED)
        case JaxserveError():
            return ApiError(400, sentence(error.problem, error.hint))
        case web.HTTPException():
            message = MESSAGES.get(error.status, f"{error.reason}.")
            headers = {"Allow": error.headers["Allow"]} if "Allow" in error.headers else {}
            return ApiError(error.status, message, headers=headers)
        case _:
            return ApiError(500, MESSAGES[500])
