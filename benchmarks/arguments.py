# SPDX-License-Identifier: Apache-2.0
"""Types for the benchmarks' argparse options: a wrong value gives one line and exit status 2, before any work."""

import argparse
import math
import os
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit


def _wrong(problem: str) -> argparse.ArgumentTypeError:
    return argparse.ArgumentTypeError(problem)


def whole(text: str, *, least: int = 1) -> int:
    try:
        value = int(text)
    except ValueError:
        raise _wrong(f"{text!r} is not a whole number") from None
    if value < least:
        raise _wrong(f"{value} is too small, expected at least {least}")
    return value


def whole_or_none(text: str) -> int:
    return whole(text, least=0)


def positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise _wrong(f"{text!r} is not a number") from None
    if not 0 < value < math.inf:
        raise _wrong(f"{text} must be positive and finite")
    return value


def several[T](kind: Callable[[str], T]) -> Callable[[str], list[T]]:
    """Comma-separated."""

    def read(text: str) -> list[T]:
        return [kind(part.strip()) for part in text.split(",") if part.strip()]

    return read


def some[T](kind: Callable[[str], T]) -> Callable[[str], list[T]]:
    """Comma-separated, at least one, no duplicates."""

    def read(text: str) -> list[T]:
        values = several(kind)(text)
        if not values or len(set(values)) < len(values):
            raise _wrong(f"{text!r} is an empty list" if not values else f"{text!r} has duplicates")
        return values

    return read


def file_to_write(text: str) -> Path:
    path = Path(text)
    if not path.parent.is_dir():
        raise _wrong(f"folder {path.parent} does not exist")
    return path


def python(text: str) -> str:
    if not os.access(text, os.X_OK) or Path(text).is_dir():
        raise _wrong(f"{text} is not an executable Python")
    return text


def url(text: str) -> str:
    """A server's URL, without the /v1 that clients use."""
    parts = urlsplit(text)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise _wrong(f"{text!r} is not a URL such as http://127.0.0.1:8000")
    return text.rstrip("/").removesuffix("/v1")
