# SPDX-License-Identifier: Apache-2.0
"""The limits of an API key, as its text says them: `rpm=600,tpm=200k,concurrent=32`. rate_limit.py applies them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Self

from jaxserve.config import ConfigError
from jaxserve.errors import one_line
from jaxserve.flags import values

FORM = "write for example rpm=600,tpm=200k,concurrent=32; none lifts a limit"


@dataclass(frozen=True, kw_only=True, slots=True)
class RateLimit:
    """None: not set; infinity: no limit."""

    rpm: float | None = None  # requests per minute
    tpm: float | None = None  # prompt and generated tokens per minute
    concurrent: float | None = None  # requests at once

    @classmethod
    def of(cls, options: Mapping[str, str], *, where: str) -> Self:
        """`where` names the source in errors."""
        return cls(**{name: _number(text, f"{where}: {name}") for name, text in options.items()})

    @classmethod
    def parse(cls, text: str, *, where: str) -> Self:
        options: dict[str, str] = {}
        for part in text.split(","):
            name, equals, value = part.strip().partition("=")
            if not equals or name not in LIMITS:
                raise ConfigError(f"{where} has {one_line(part.strip())!r}, which is no limit", FORM)
            if name in options:
                raise ConfigError(f"{where} sets {name} twice", "remove one of them")
            options[name] = value
        return cls.of(options, where=where)

    def over(self, default: "RateLimit") -> "RateLimit":
        """These limits, and where they are not set the defaults."""
        pairs = {name: (getattr(self, name), getattr(default, name)) for name in LIMITS}
        return RateLimit(**{name: usual if own is None else own for name, (own, usual) in pairs.items()})


UNSET = RateLimit()
LIMITS = tuple(field.name for field in fields(RateLimit))


def _number(text: str, what: str) -> float:
    if text == "none":
        return math.inf
    found = values.whole_number(text)
    if found is None or found < 1:
        raise ConfigError(f"{what} is {text!r}, expected a whole number of at least 1", FORM)
    return found
