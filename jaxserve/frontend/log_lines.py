# SPDX-License-Identifier: Apache-2.0
"""Lines of a log, as text or JSON; and a standard error stream on which every line is JSON.

Control characters in clients' text are escaped, so that clients cannot forge lines. Secrets are masked.
"""

import io
import json
import logging
import sys
import threading
import time
import warnings
from collections.abc import Collection
from typing import Any, TextIO

from jaxserve.errors import one_line

LONGEST_LINE = 100_000
TRACEBACK = "Traceback (most recent call last):"


class Lines(logging.Formatter):
    """Formats a record as one line. In text format a traceback follows, indented."""

    def __init__(self, form: str, secrets: Collection[str] = ()) -> None:
        super().__init__()
        self._json = form == "json"
        self.mask(secrets)

    def mask(self, secrets: Collection[str]) -> None:
        written = {form for secret in secrets for form in (secret, json.dumps(secret)[1:-1])}
        self._secrets = sorted(written, key=len, reverse=True)  # longest first: one may contain another

    def format(self, record: logging.LogRecord) -> str:
        given: dict[str, Any] = getattr(record, "fields", {})
        trace = self.formatException(record.exc_info) if record.exc_info else ""
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z"
        message = self._masked(record.getMessage())
        if self._json:
            line = {"time": moment, "level": record.levelname.lower(), "message": message}
            line |= {key: float(f"{value:.6g}") if isinstance(value, float) else value for key, value in given.items()}
            if trace:
                line["exception"] = trace
            # json.dumps escapes non-ASCII characters, so that none can act as a line break or a control code.
            return self._masked(json.dumps(line, default=str))
        text = " ".join((message, *(f"{key}={_shown(value)}" for key, value in given.items() if value is not None)))
        lines = [f"{moment} {record.levelname:<7} {one_line(self._masked(text), limit=LONGEST_LINE)}"]
        lines += [f"    {one_line(self._masked(line), limit=2000)}" for line in trace.splitlines()]
        return "\n".join(lines)

    def _masked(self, text: str) -> str:
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return text


def _shown(value: object) -> str:
    """A value as text; quoted if it could be taken for several fields."""
    if isinstance(value, str) and any(c in value for c in ' ="'):  # other spaces are escaped in the whole line
        return json.dumps(value, ensure_ascii=False)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


class JsonStderr(io.TextIOBase):
    """Stands for sys.stderr: what programs print there becomes lines of JSON, a traceback one line."""

    def __init__(self, stream: TextIO, secrets: Collection[str]) -> None:
        super().__init__()
        self.stream, self.lines = stream, Lines("json", secrets)
        self._lock = threading.RLock()
        self._rest = ""  # of a line
        self._trace: list[str] = []

    def write(self, text: str, /) -> int:
        with self._lock:
            *lines, self._rest = (self._rest + text).split("\n")
            for line in lines:
                self._take(line)
        return len(text)

    def _take(self, line: str) -> None:
        if line == TRACEBACK or self._trace:
            self._trace.append(line)
            if line.startswith(" ") or line == TRACEBACK:
                return  # the line with the exception ends it
            trace, self._trace = self._trace, []
            self.log(logging.ERROR, line, exception="\n".join(trace))
        elif line.strip():
            self.log(_level(line), line)

    def log(self, level: int, message: str, **more: str) -> None:
        record = logging.LogRecord("stderr", level, "", 0, message, None, None)
        record.fields = more
        self.stream.write(self.lines.format(record) + "\n")

    def flush(self) -> None:
        with self._lock:
            if self._rest:
                self.write("\n")
            if self._trace:
                trace, self._trace = self._trace, []
                self.log(logging.ERROR, trace[-1].strip(), exception="\n".join(trace))
        self.stream.flush()

    def fileno(self) -> int:
        return self.stream.fileno()

    def writable(self) -> bool:
        return True

    @property
    def encoding(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.stream.encoding


def _level(line: str) -> int:
    start = line[:200].lower()
    if start.startswith("error"):
        return logging.ERROR
    return logging.WARNING if "warning" in start else logging.INFO


def write_json(secrets: Collection[str] = ()) -> None:
    """From now on, all that Python writes to standard error is JSON: prints, tracebacks, warnings, other libraries'
    logs. May be called again."""
    if isinstance(sys.stderr, JsonStderr):
        return
    sys.stderr = wrapped = JsonStderr(sys.stderr, secrets)

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        wrapped.log(logging.WARNING, str(message), category=category.__name__, where=f"{filename}:{lineno}")

    warnings.showwarning = show
    logging.getLogger().handlers = [handler("json", secrets)]


def handler(form: str, secrets: Collection[str] = ()) -> logging.Handler:
    """Writes records to standard error."""
    stream = sys.stderr
    if isinstance(stream, JsonStderr):
        made, lines = logging.StreamHandler(stream.stream), stream.lines
    else:
        made, lines = logging.StreamHandler(stream), Lines(form, secrets)
    made.setFormatter(lines)
    return made
