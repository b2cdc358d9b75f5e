# SPDX-License-Identifier: Apache-2.0
"""The errors a user can cause. A leaf: all of ours may import it, it imports nothing of ours."""


def one_line(text: str, *, limit: int = 200) -> str:
    """`text` safe to print on one line of a terminal or a log.

    Names come out of files that nobody vouches for: control characters would forge log lines or
    drive the terminal, lone surrogates cannot be encoded, and a name may be megabytes long.
    """
    if len(text) > limit:
        text = text[: limit - 1] + "…"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class JaxserveError(Exception):
    """A fault the user can mend. Its text is one line: what was wrong; what to do."""

    def __init__(self, problem: str, hint: str) -> None:
        self.problem = one_line(problem, limit=2000)
        self.hint = one_line(hint, limit=2000)
        super().__init__(f"{self.problem}; {self.hint}")

    def __reduce__(self) -> tuple[type["JaxserveError"], tuple[str, ...]]:
        # Errors cross processes; the default would call the class with the joined text and fail.
        return type(self), (self.problem, self.hint)


class UsageError(JaxserveError):
    """A command that was called wrongly."""


class CheckpointError(JaxserveError):
    """A checkpoint that is absent, damaged or hostile."""


class RequestError(JaxserveError):
    """A request that cannot be served as asked; found before any device work. `field` is the one to change."""

    status = 400

    def __init__(self, field: str, problem: str, hint: str) -> None:
        self.field = field
        super().__init__(problem, hint)

    def __reduce__(self) -> tuple[type["RequestError"], tuple[str, ...]]:
        return type(self), (self.field, self.problem, self.hint)


class OverloadedError(RequestError):
    """The queue is full; the same request may do later."""

    status = 503


class EngineError(JaxserveError):
    """A fault of the engine itself: what was in flight is lost."""


def message_of(error: BaseException) -> str:
    """What an error of another library says, in one line."""
    return one_line(str(error) or type(error).__name__, limit=400)
