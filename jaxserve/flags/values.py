# SPDX-License-Identifier: Apache-2.0
"""Values of flags: read from the command line or a YAML file, and checked, with the same sentence in Python.

Whole numbers may have a unit: 4k is 4000, 4K is 4096, 8GB is 8 * 10**9, 8GiB is 8 * 2**30.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING
from pathlib import Path
from typing import Any, NoReturn, cast

from jaxserve.errors import JaxserveError, UsageError
from jaxserve.flags.setting import Flag, Setting, flags_of

_SCALES = {"k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_NUMBER = re.compile(r"([+-]?\d[\d_]*(?:\.\d+)?) ?(?:([kmgtKMGT])(i?[bB]?))?", re.ASCII)
_WORDS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
_NOUNS = {bool: "true or false", int: "a whole number", float: "a number"}


# --- reading --------------------------------------------------------------------------------------------------------


def from_text(flag: Flag, text: str) -> Any:
    """The value that an argument on the command line stands for."""
    if flag.optional and flag.base is not str and text.lower() in ("none", "auto", "null"):
        return None
    if flag.setting.yes_no is not None and text not in flag.choices and text.lower() in _WORDS:
        return from_data(flag, _WORDS[text.lower()])
    if flag.choices and text not in flag.choices:
        hint = _expected(flag)
        if flag.setting.unknown_choice:
            raise UsageError(flag.setting.unknown_choice.format(repr(text)), hint)
        _refuse(flag, text, hint)
    if flag.base is bool:
        if text.lower() not in _WORDS:
            _refuse(flag, text, f"use true or false, or {flag.option} alone")
        return _WORDS[text.lower()]
    if flag.base is int:
        return _whole(flag, text)
    if flag.base is float:
        try:
            return float(text)
        except ValueError:
            _refuse(flag, text, "use a number")
    return Path(text) if flag.base is Path else text


def is_choice(flag: Flag, text: str | None) -> bool:
    """Whether a word after a flag that may stand alone is its value."""
    return text is not None and (text in flag.choices or text.lower() in _WORDS)


def from_data(flag: Flag, value: Any) -> Any:
    """The same for a value from a YAML file, which has a type already."""
    if value is None:
        if not flag.optional:
            raise UsageError(f"{flag.shown} has no value", "set one, or remove the line")
        return None
    if flag.many:
        items = cast("list[Any]", value) if isinstance(value, list) else [value]
        return tuple(_item(flag, item) for item in items)
    return _item(flag, value)


def opposite(flag: Flag, value: Any) -> Any:
    """The value of a flag whose negative form has this value in a YAML file."""
    taken = from_data(flag, value)
    if flag.setting.yes_no is None:
        return not taken
    yes, no = flag.setting.yes_no
    if taken not in (yes, no):
        raise UsageError(f"{flag.negative} is {value!r}", f"use true, or {flag.option} with this value")
    return no if taken == yes else yes


def _item(flag: Flag, value: Any) -> Any:
    if isinstance(value, str):
        return from_text(flag, value)
    if isinstance(value, bool) and flag.setting.yes_no is not None:
        return flag.setting.yes_no[not value]
    wanted = (int, float) if flag.base is float else flag.base
    if not isinstance(value, wanted) or (isinstance(value, bool) and flag.base is not bool):
        _refuse(flag, value, f"use {_NOUNS.get(flag.base, 'a string')}")
    return value


def _whole(flag: Flag, text: str) -> int:
    if _NUMBER.fullmatch(text.strip()) is None:
        _refuse(flag, text, "use a whole number, such as 4096, 4k (4000) or 4K (4096)")
    value = whole_number(text)
    if value is None:
        _refuse(flag, text, "use a whole number")
    return value


def whole_number(text: str) -> int | None:
    """The number that a text such as 4096, 4k or 4K stands for; None if it is not a whole number."""
    found = _NUMBER.fullmatch(text.strip())
    if found is None:
        return None
    digits, letter, unit = found.groups()
    scale = 1
    if letter:
        # 4k and 4K, 8GB and 8GiB: an i means 1024, a unit without one 1000; for a bare letter the case decides.
        scale = _SCALES[letter.upper() if "i" in unit else letter.lower() if unit else letter]
    value = float(digits) * scale if "." in digits else int(digits) * scale
    return int(value) if value == int(value) else None


def _refuse(flag: Flag, value: object, hint: str) -> NoReturn:
    raise UsageError(f"{flag.shown} is {'invalid' if flag.secret else repr(value)}", hint)


# --- checking -------------------------------------------------------------------------------------------------------


def check(settings: object, error: type[JaxserveError] = UsageError) -> None:
    """Checks the fields of a dataclass that have a Setting, when it is made. Lists become tuples."""
    for flag in flags_of(type(settings)):
        if flag.own:
            value: Any = getattr(settings, flag.name)
            if flag.many and isinstance(value, list):
                value = tuple(cast("list[object]", value))
                object.__setattr__(settings, flag.name, value)
            if fault := _fault(flag, value):
                raise error(*fault)


def _fault(flag: Flag, value: Any) -> tuple[str, str] | None:
    """What is wrong with a value, and what to do."""
    if value is None and flag.optional:
        return None
    if flag.many:
        return _fault_of_list(flag, value)
    if value == "" and flag.base is str and not flag.setting.empty and not flag.choices:
        return f"{flag.name} is empty", "set it to a value, or remove it"
    shown = f"{flag.name} is {'invalid' if flag.secret else repr(value)}"
    if not _right_type(flag, value) or (flag.choices and value not in flag.choices):
        return shown, _expected(flag)
    outside = _outside(flag.setting, value) if flag.base in (int, float) and not flag.choices else None
    return None if outside is None else (f"{shown}, {outside}", _expected(flag))


def _fault_of_list(flag: Flag, value: Any) -> tuple[str, str] | None:
    if not isinstance(value, tuple):
        return f"{flag.name} is of type {type(value).__name__}", "use a list of strings"
    entries = cast("tuple[object, ...]", value)
    if not all(isinstance(entry, str) and entry for entry in entries):
        return f"{flag.name} has an entry that is empty or not a string", "correct or remove it"
    if not flag.secret and any(str(entry).startswith('["') for entry in entries):
        return f"{flag.name} has an entry that is a JSON list", "separate the entries with spaces, without brackets"
    return None


def _right_type(flag: Flag, value: Any) -> bool:
    if isinstance(value, bool):
        return flag.base is bool
    if flag.base is float:
        return isinstance(value, int | float) and (math.isfinite(value) or value == flag.setting.high)
    return isinstance(value, flag.base)


def _outside(bounds: Setting, value: Any) -> str | None:
    """Which bound a number violates."""
    if bounds.low is not None and value < bounds.low:
        return f"below the minimum of {bounds.low}"
    if bounds.above is not None and value <= bounds.above:
        return f"not above {bounds.above}"
    if bounds.high is not None and value > bounds.high:
        return f"above the maximum of {bounds.high}"
    if bounds.below is not None and value >= bounds.below:
        return f"not below {bounds.below}"
    return "not a power of two" if bounds.power_of_two and value & (value - 1) else None


def _expected(flag: Flag) -> str:
    """What a value must be, as a hint."""
    bounds = flag.setting
    if flag.choices:
        return f"choose one of {', '.join(flag.choices)}"
    noun = "a power of two" if bounds.power_of_two else _NOUNS.get(flag.base, "a string")
    if bounds.unit:
        noun += f" of {bounds.unit}"
    high = None if bounds.high == math.inf else bounds.high
    if bounds.low is not None and high is not None:
        noun += f" from {bounds.low} to {high}"
    elif bounds.low is not None:
        noun += f" of at least {bounds.low}"
    elif bounds.above is not None:
        noun += f" above {bounds.above}" + (f" and at most {high}" if high is not None else "")
    if bounds.below is not None:
        noun += f" and below {bounds.below}"
    return f"use {noun}, or inf" if bounds.high == math.inf else f"use {noun}"


def changed(flags: Sequence[Flag], given: Mapping[str, Any]) -> str:
    """The settings that differ from their defaults, on one line, with secrets masked."""
    parts: list[str] = []
    for flag in flags:
        value = given.get(flag.name, MISSING)
        if value is MISSING or value == flag.default:
            continue
        shown = "***" if flag.secret else value
        if isinstance(shown, tuple):
            shown = ",".join(map(str, cast("tuple[object, ...]", shown)))
        parts.append(f"{flag.name}={shown}")
    return "  ".join(parts)
