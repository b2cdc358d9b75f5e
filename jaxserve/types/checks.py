# SPDX-License-Identifier: Apache-2.0
"""Kinds of values that users give, and their checks. A bad value raises a RequestError that names it.

A kind is called with a name and a value and returns the value as plain Python data. Its `words` follow "expected".
"""

import math
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from enum import Enum
from typing import Any, cast

from jaxserve import unsupported
from jaxserve.errors import RequestError

INT32_MAX = 2**31 - 1


def check_names(kind: type, given: Mapping[str, object]) -> None:
    """Raise unless every name is a field of the dataclass."""
    known = cast("Mapping[str, object]", cast(Any, kind).__dataclass_fields__)
    for name in given:
        if name in known:
            continue
        if reason := unsupported.SAMPLING_PARAMETERS.get(name) or unsupported.SETTINGS.get(name):
            raise RequestError(name, *reason.about(name))
        close = get_close_matches(str(name), known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(known)}"
        raise RequestError(str(name), f"{kind.__name__} has no field {name!r}", hint)


def refused(name: str, value: object, wanted: str) -> RequestError:
    try:
        shown = str(value) if isinstance(value, int | float) else repr(str(value)[:80])
    except ValueError:  # Python refuses to convert integers of thousands of digits
        shown = "a number too long to print"
    return RequestError(name, f"{name} is {shown}, expected {wanted}", "correct the value")


@dataclass(frozen=True, slots=True)
class Integer:
    low: int
    high: int

    @property
    def words(self) -> str:
        return f"a whole number from {_written(self.low)} to {_written(self.high)}"

    def __call__(self, name: str, value: object) -> int | None:
        if type(value) is not int and (isinstance(value, bool) or not isinstance(value, numbers.Integral)):
            raise refused(name, value, self.words)
        found = int(value)
        if not self.low <= found <= self.high:
            raise refused(name, value, self.words)
        return found


@dataclass(frozen=True, slots=True)
class TopTokens(Integer):
    """How many of the most likely tokens to return: -1 for all, True for one, False for no log probabilities at all."""

    low: int = -1
    high: int = INT32_MAX

    def __call__(self, name: str, value: object) -> int | None:
        if isinstance(value, bool):
            return 1 if value else None
        return Integer.__call__(self, name, value)


@dataclass(frozen=True, slots=True, kw_only=True)
class Number:
    low: float = -math.inf
    above: float = -math.inf
    high: float = math.inf

    @property
    def words(self) -> str:
        kind = "a finite number" if self.high == math.inf else "a number"
        if self.above > -math.inf:
            return f"{kind} above {self.above:g}" + ("" if self.high == math.inf else f" and at most {self.high:g}")
        least = f" from {self.low:g}" if self.low > -math.inf else ""
        return kind + least + ("" if self.high == math.inf else f" to {self.high:g}")

    def __call__(self, name: str, value: object) -> float:
        try:
            number = math.nan if isinstance(value, bool) or not isinstance(value, numbers.Real) else float(value)
        except OverflowError:
            number = math.inf
        if not math.isfinite(number) or not self.low <= number <= self.high or not number > self.above:
            raise refused(name, value, self.words)
        return number


@dataclass(frozen=True, slots=True)
class Boolean:
    words = "true or false"

    def __call__(self, name: str, value: object) -> bool:
        if not isinstance(value, bool):
            raise refused(name, value, self.words)
        return value


@dataclass(frozen=True, slots=True)
class Choice:
    """A member of an Enum."""

    options: type[Enum]

    @property
    def words(self) -> str:
        return f"a {self.options.__name__}"

    def __call__(self, name: str, value: object) -> Enum:
        if not isinstance(value, self.options):
            raise refused(name, value, self.words)
        return value


@dataclass(frozen=True, slots=True, kw_only=True)
class Strings:
    """Non-empty strings. None is an empty list, a single string a list of one; `alone`: and is documented as such."""

    most: int | None = None
    alone: bool = False

    @property
    def words(self) -> str:
        return f"{'a string or ' if self.alone else ''}a list of strings, none empty"

    def __call__(self, name: str, value: object) -> tuple[str, ...]:
        texts = (value,) if isinstance(value, str) else _items(name, value)
        for text in texts:
            if not isinstance(text, str) or not text:
                raise refused(name, text, self.words)
        _check_count(name, texts, self.most)
        return cast("tuple[str, ...]", texts)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenIds:
    """Token ids without repetition; whether a model has them is checked when a request meets an engine."""

    least: int = 0
    most: int | None = None

    @property
    def words(self) -> str:
        return "a list of token ids"

    def __call__(self, name: str, value: object) -> tuple[int, ...]:
        ids = tuple(dict.fromkeys(_token_id(name, token) for token in _items(name, value)))
        if len(ids) < self.least:
            raise RequestError(name, f"{name} is empty", "give at least one token id")
        _check_count(name, ids, self.most)
        return ids


@dataclass(frozen=True, slots=True, kw_only=True)
class Biases:
    """Numbers by token id, clipped to the range; None if there is none."""

    most: int
    low: float
    high: float

    @property
    def words(self) -> str:
        return "a mapping of token ids to numbers"

    def __call__(self, name: str, value: object) -> dict[int, float] | None:
        if not isinstance(value, Mapping):
            raise refused(name, value, self.words)
        given = cast("Mapping[object, object]", value)
        _check_count(name, given, self.most)
        pairs: dict[int, float] = {}
        for key, bias in given.items():
            token = int(key) if isinstance(key, str) and _is_decimal(key) else key
            pairs[_token_id(name, token)] = min(max(Number()(name, bias), self.low), self.high)
        return pairs or None


type ValueKind = Integer | Number | Boolean | Choice | Strings | TokenIds | Biases


def _written(bound: int) -> str:
    """Long ones as powers of two."""
    if abs(bound) < 2**24:
        return str(bound)
    power = f"2^{bound.bit_length()}" if bound > 0 else f"-2^{abs(bound).bit_length() - 1}"
    return f"{power}-1" if bound > 0 else power


def _items(name: str, value: object) -> tuple[object, ...]:
    if value is None:
        return ()
    if isinstance(value, str | bytes) or not isinstance(value, Sequence | set | frozenset):
        raise refused(name, value, "a list")
    return tuple(cast("Sequence[object]", value))


def _token_id(name: str, value: object) -> int:
    return cast(int, _TOKEN_ID(name, value))


_TOKEN_ID = Integer(0, INT32_MAX)


def _check_count(name: str, values: Sequence[object] | Mapping[object, object], most: int | None) -> None:
    if most is not None and len(values) > most:
        raise RequestError(name, f"{name} has {len(values)} entries", f"use at most {most}")


def _is_decimal(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) < 12
