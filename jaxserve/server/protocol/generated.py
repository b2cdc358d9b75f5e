# SPDX-License-Identifier: Apache-2.0
"""Fields of request bodies that are generated from tables: the sampling parameters, and unsupported fields.

Ranges are those of the parameters. A body has additional limits on the length of lists and strings.
"""

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, Field, create_model

from jaxserve.server.protocol.base import AS_WHOLE, Expected
from jaxserve.server.protocol.bounds import MAX_VALUES
from jaxserve.types.checks import Biases, Boolean, Choice, Integer, Number, Strings, TokenIds, ValueKind
from jaxserve.types.parameters import Parameter
from jaxserve.unsupported import Reason

MAX_STRINGS = 16
MAX_STRING_LENGTH = 1024

String = Annotated[str, Field(min_length=1, max_length=MAX_STRING_LENGTH)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]


def with_parameters[B: BaseModel](base: type[B], parameters: Iterable[Parameter]) -> type[B]:
    """The body with a field for each parameter that requests may set; null or no value means the default."""
    return _extended(base, {each.name: _field(each) for each in parameters if each.sent})


def with_unsupported[B: BaseModel](base: type[B], reasons: Mapping[str, Reason]) -> type[B]:
    """The body with fields that are rejected by name if they have a value that changes the answer."""
    null = Field(description="Not supported yet; must be null.")
    fields = {
        name: Annotated[None, BeforeValidator(partial(_none_if_neutral, reason)), null, reason]
        for name, reason in reasons.items()
    }
    return _extended(base, fields)


def _none_if_neutral(reason: Reason, value: Any) -> Any:
    """The value, or None if it asks for nothing: many clients send empty lists and defaults."""
    if value in ("", [], {}):
        return None if reason.empty else value
    if value is False and True not in reason.neutral:
        return None
    return None if value in reason.neutral else value


def _extended[B: BaseModel](base: type[B], fields: dict[str, Any]) -> type[B]:
    given: dict[str, Any] = {name: (annotation, None) for name, annotation in fields.items()}
    return create_model(base.__name__, __base__=base, __module__=base.__module__, **given)


def _field(parameter: Parameter) -> Any:
    annotation, expected = _annotation(parameter.kind)
    return Annotated[annotation | None, Field(description=parameter.about), Expected(expected)]


def _annotation(kind: ValueKind) -> tuple[Any, str]:
    """The type of a field, and a description of valid values."""
    match kind:
        case Integer():
            return Annotated[int, Field(ge=kind.low, le=kind.high), AS_WHOLE], kind.words
        case Number():
            bounds = {"ge": kind.low, "gt": kind.above, "le": kind.high}
            finite: Any = {name: bound for name, bound in bounds.items() if abs(bound) != float("inf")}
            return Annotated[float, Field(**finite)], kind.words
        case Boolean():
            return bool, kind.words
        case Strings():
            most = kind.most or MAX_STRINGS
            strings: Any = Annotated[list[String], Field(fail_fast=True, max_length=most)]
            words = f"a list of up to {most} strings of 1 to {MAX_STRING_LENGTH} characters"
            return (String | strings, f"a string or {words}") if kind.alone else (strings, words)
        case TokenIds():
            most = kind.most or MAX_VALUES
            ids = Annotated[list[TokenId], Field(fail_fast=True, min_length=kind.least or None, max_length=most)]
            return ids, f"a list of {kind.least or 'up'} to {most} token ids"
        case Biases():
            biases = Annotated[dict[str, float], Field(max_length=kind.most)]
            return biases, f"an object with up to {kind.most} token ids as keys and numbers as values"
        case Choice():
            raise TypeError(f"{kind.words} cannot be sent")
