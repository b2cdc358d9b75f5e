# SPDX-License-Identifier: Apache-2.0
"""Checks of single values that users give. Each raises a RequestError that names the value."""

import math
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import fields
from difflib import get_close_matches
from typing import Any, cast

from jaxserve import unsupported
from jaxserve.errors import RequestError


def check_names(kind: type, given: Mapping[str, object]) -> None:
    """That every name is a field of the dataclass."""
    known = [f.name for f in fields(cast(Any, kind))]
    for name in given:
        if name in known:
            continue
        if reason := unsupported.SAMPLING_PARAMETERS.get(name) or unsupported.SETTINGS.get(name):
            raise RequestError(name, *reason.about(name))
        close = get_close_matches(str(name), known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(known)}"
        raise RequestError(str(name), f"{name!r} is no field of {kind.__name__}", hint)


def refused(name: str, value: object, wanted: str) -> RequestError:
    try:
        shown = repr(str(value)[:80])
    except ValueError:  # Python refuses to write integers of thousands of digits
        shown = "a number too long to print"
    return RequestError(name, f"{name} is {shown}, expected {wanted}", "correct the value")


def integer(name: str, value: object, *, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or not low <= int(value) <= high:
        raise refused(name, value, f"a whole number from {low} to {high}")
    return int(value)


def number(
    name: str, value: object, *, low: float = -math.inf, above: float = -math.inf, high: float = math.inf
) -> float:
    try:
        number = math.nan if isinstance(value, bool) or not isinstance(value, numbers.Real) else float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number) or not low <= number <= high or not (number > above):
        least = f" above {above:g}" if above > -math.inf else f" from {low:g}" if low > -math.inf else ""
        wanted = f"a finite number{least}" if high == math.inf else f"a number{least} to {high:g}"
        raise refused(name, value, wanted)
    return number


def boolean(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise refused(name, value, "true or false")


def items(name: str, value: object) -> tuple[object, ...]:
    if value is None:
        return ()
    if isinstance(value, str | bytes) or not isinstance(value, Sequence | set | frozenset):
        raise refused(name, value, "a list")
    return tuple(cast("Sequence[object]", value))


def token_ids(name: str, value: object) -> tuple[int, ...]:
    """Token ids without repetition; that a model has them is checked when it is known."""
    return tuple(dict.fromkeys(integer(name, token, low=0, high=2**31 - 1) for token in items(name, value)))


def is_decimal(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) < 12
