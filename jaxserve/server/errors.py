# SPDX-License-Identifier: Apache-2.0
"""Turns exceptions into OpenAI's error responses: a status and {"error": {message, type, param, code}}.

Maps the project's own exceptions and aiohttp's. Removes paths, addresses and tracebacks from messages.
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
    404: "Not found.",
    405: "Method not allowed. See the Allow header.",
    413: "Request too large.",
    500: "Internal server error. See the server log.",
}
SHUT_DOWN = "The server shut down before this response was complete."
ENGINE_FAILED = "The engine failed and this request was lost. See the server log."
RETRY_AFTER = {"Retry-After": "1"}

# First words of our messages that are not field names: these are capitalized.
OPENINGS = frozenset(
    (
        *("a", "an", "the", "this", "of", "no", "every", "both", "there", "unknown", "did", "give", "leave", "send"),
        *("set", "say", "start", "ask", "correct", "lower", "raise", "shorten", "make", "try", "allow", "drop", "use"),
        *("requests", "cannot", "neither", "queue"),
    )
)

# Details of this machine: memory addresses, file paths, stack traces. Paths under /v1/ are our own routes.
PRIVATE = re.compile(
    r"0x[0-9a-fA-F]{6,}|(?:(?<!\w)/(?!v1/)(?:[\w.+-]+/)+[\w.+-]*)|File \"[^\"]*\"?|Traceback.*", re.DOTALL
)


class ApiError(Exception):
    """An error response."""

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
    """A problem and a hint, as two sentences."""
    return scrubbed(f"{_sentence(problem)} {_sentence(hint, names=False)}")


def _sentence(text: str, *, names: bool = True) -> str:
    """`names`: the first word may be a field name, which is not capitalized."""
    first = text.split(" ", 1)[0]
    if first in OPENINGS or (not names and first.rstrip(",:").isalpha()):
        text = text[:1].upper() + text[1:]
    return text if text.endswith(("?", ".", "…")) else f"{text}."


def scrubbed(text: str) -> str:
    return PRIVATE.sub("…", text)


def as_api_error(error: BaseException) -> ApiError:
    """The error response for any exception. Server faults become a 500 without details; the caller logs them."""
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
