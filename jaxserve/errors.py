# SPDX-License-Identifier: Apache-2.0
"""Exceptions that are reported to users. Imports nothing from the project, so that every module can import it."""


def one_line(text: str, *, limit: int = 200) -> str:
    """Return `text` in a form that is safe on one line of a terminal or a log.

    Names come from untrusted files: control characters could forge log lines or drive the terminal,
    lone surrogates cannot be encoded, and a name can be megabytes long.
    """
    if len(text) > limit:
        text = text[: limit - 1] + "…"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class JaxserveError(Exception):
    """An error the user can fix. Its text is one line: the problem, then a hint on how to fix it."""

    def __init__(self, problem: str, hint: str) -> None:
        self.problem = one_line(problem, limit=2000)
        self.hint = one_line(hint, limit=2000)
        super().__init__(f"{self.problem}; {self.hint}")

    def __reduce__(self) -> tuple[type["JaxserveError"], tuple[str, ...]]:
        # Errors are pickled between processes; the default would pass the joined text to __init__ and fail.
        return type(self), (self.problem, self.hint)


class UsageError(JaxserveError):
    """Invalid command-line usage."""


class CheckpointError(JaxserveError):
    """A checkpoint that is missing, corrupt or malicious."""


class RequestError(JaxserveError):
    """A request that cannot be served as sent. Raised before any device work; `field` is the one to change."""

    status = 400

    def __init__(self, field: str, problem: str, hint: str) -> None:
        self.field = field
        super().__init__(problem, hint)

    def __reduce__(self) -> tuple[type["RequestError"], tuple[str, ...]]:
        return type(self), (self.field, self.problem, self.hint)


class OverloadedError(RequestError):
    """The queue is full; the same request can succeed later."""

    status = 503


class EngineError(JaxserveError):
    """A failure of the engine itself; requests in flight are lost."""


def message_of(error: BaseException) -> str:
    """The message of another library's exception, on one line."""
    return one_line(str(error) or type(error).__name__, limit=400)
