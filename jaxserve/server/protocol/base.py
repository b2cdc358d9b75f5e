# SPDX-License-Identifier: Apache-2.0
"""The base of all request bodies: strict values, and errors that name the field.

Fields of other servers that this one does not support are declared too: a value that changes the answer is rejected
with an error that names the field, never ignored. What happens to names that are not declared is the server's setting.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Annotated, Any, Literal, cast, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from jaxserve.errors import one_line
from jaxserve.server.config import UnknownFields
from jaxserve.server.errors import ApiError, bad_request
from jaxserve.server.protocol import bounds, long_values
from jaxserve.unsupported import WITHOUT_EFFECT, Reason

MAX_NAME = 1024  # characters
MAX_CALL_ID = 64
MAX_MODEL_NAME = 4096

Name = Annotated[str, Field(max_length=MAX_NAME)]
_NOT_YET = Reason("is not supported yet", "remove it")


def _as_whole(value: object) -> object:
    return int(value) if isinstance(value, float) and value.is_integer() else value


AS_WHOLE = BeforeValidator(_as_whole)  # of a whole number: JavaScript and many a configuration file write 16.0 for 16

NeverTrue = Annotated[Literal[False] | None, Field(description="Not supported yet; must be false or null."), _NOT_YET]


@dataclass(frozen=True, slots=True)
class Expected:
    """Annotates a field with a description of valid values, for errors."""

    words: str
    each: str | None = None  # of an element of a list, where it may be of several kinds


class Strict(BaseModel):
    """A body, or an object within one."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, frozen=True, hide_input_in_errors=True)


class RequestBody(Strict):
    """A whole body."""

    model: Annotated[
        str | None, Field(max_length=MAX_MODEL_NAME, description="Model name, as listed by /v1/models; optional.")
    ] = None


_EXTRA: dict[UnknownFields, Literal["allow", "ignore"] | None] = {"warn": "allow", "refuse": None, "ignore": "ignore"}


def parse[B: BaseModel](kind: type[B], raw: bytes, *, unknown: UnknownFields = "refuse") -> B:
    """Parse a body. Raises an ApiError that names the fault. With `unknown="warn"`, the body keeps its unknown fields:
    see `unknown_fields`."""
    first = bounds.check(raw, kind.model_fields)
    if first is not None and unknown == "refuse":
        raise _unknown(one_line(first, limit=80), first, kind)
    given = raw
    raw, taken = long_values.taken_out(raw, kind.model_fields) if len(raw) > bounds.SMALL else (raw, {})
    try:
        body = kind.model_validate_json(raw, extra=_EXTRA[unknown])
    except ValidationError as error:
        raise as_api_error(error, kind, given if unknown == "warn" else None) from None
    return long_values.put_back(body, taken)


def unknown_fields(body: BaseModel) -> dict[str, type[BaseModel]]:
    """The unknown fields of a body and of the objects within it, such as messages.id, and where they are."""
    return dict(_unknown_fields(body, ""))


def _unknown_fields(body: BaseModel, prefix: str) -> Iterator[tuple[str, type[BaseModel]]]:
    yield from ((prefix + name, type(body)) for name in body.model_extra or ())
    for name in body.model_fields_set:
        value: object = getattr(body, name) if name in type(body).model_fields else None
        listed = cast("list[object]", value) if isinstance(value, list) else [value]
        if listed and not isinstance(listed[0], int | list):  # long lists of token ids hold nothing else
            for each in listed:
                if isinstance(each, BaseModel):
                    yield from _unknown_fields(each, f"{prefix}{name}.")


def as_api_error(error: ValidationError, kind: type[BaseModel], raw: bytes | None = None) -> ApiError:
    """The most specific fault, in a sentence or two. `raw`: the body, if a misspelled name in it was not a fault."""
    faults = error.errors(include_url=False, include_input=False, include_context=True)
    fault = min(faults, key=lambda fault: (_FIRST.get(fault["type"], 4), len(fault["loc"])))
    if fault["type"] == "json_invalid":
        reason = one_line(str(fault.get("ctx", {}).get("error", "")), limit=120)
        return bad_request(None, f"the body is not valid JSON: {reason}", "send one JSON object in UTF-8")
    if fault["type"] == "model_type" and not fault["loc"]:
        return bad_request(None, "the body is not a JSON object", 'send an object: {"model": …}')
    if fault["type"] == "value_error":  # from a body's validator; its text is "problem; hint"
        problem, _, hint = str(fault.get("ctx", {}).get("error", "")).partition("; ")
        _, inside, _ = _place(kind, fault)
        problem = f"{inside}.{problem}" if inside else problem
        name = problem.split(" ", 1)[0]
        known = re.split(r"[.\[]", name, maxsplit=1)[0] in kind.model_fields
        return bad_request(name if known else None, problem, hint)
    model, path, field = _place(kind, fault)
    if fault["type"] == "extra_forbidden":
        return _unknown(path, str(fault["loc"][-1]), model)
    if fault["type"] == "missing":
        return _misspelled(kind, raw) or bad_request(path, f"{path} is missing", "add it")
    notes = field.metadata if field is not None else []
    if reason := next((note for note in notes if isinstance(note, Reason)), None):
        return bad_request(path, *reason.about(path))
    expected = next(
        (note.each if path.endswith("]") else note.words for note in notes if isinstance(note, Expected)), None
    )
    # For an element of a list, pydantic's fault is more specific than what is expected of the field.
    wanted = _wanted(fault) if expected is None else f"be {expected}"
    if wanted == "be a whole number" and not path.endswith("]"):
        wanted += _range(notes)
    return ApiError(400, f"{path} must {wanted}.", param=path)


# Of several faults, the first in this order is reported: an unsupported field, then a misspelled name, which is often
# the reason why another field is missing.
_FIRST = {"json_invalid": 0, "none_required": 1, "literal_error": 2, "extra_forbidden": 3, "missing": 5}


def _misspelled(kind: type[BaseModel], raw: bytes | None) -> ApiError | None:
    """The error about an unknown name, which may be why another field is missing."""
    try:
        if raw is not None:
            kind.model_validate_json(raw)
    except ValidationError as error:
        found = as_api_error(error, kind)
        return found if "Did you mean" in found.message else None
    return None


def did_you_mean(name: str, model: type[BaseModel]) -> str | None:
    close = get_close_matches(name[:80], model.model_fields, n=1)
    return f"did you mean {close[0]}?" if close else None


def _unknown(path: str, name: str, model: type[BaseModel]) -> ApiError:
    hint = did_you_mean(name, model) or "remove it, or start the server with --unknown-fields warn"
    problem = f"{path} has no effect" if name in WITHOUT_EFFECT else f"unknown field: {path}"
    return bad_request(path, problem, hint)


def _place(kind: type[BaseModel], fault: ErrorDetails) -> tuple[type[BaseModel], str, FieldInfo | None]:
    """The location of a fault: the model, the path in the client's notation, the field.

    pydantic's path also has the union members that it tried, and keys of objects that are not fields.
    """
    model, path, field = kind, "", None
    for place, step in enumerate(fault["loc"]):
        if isinstance(step, int):
            path += f"[{step}]"
        elif step in model.model_fields:
            path += f".{step}" if path else step
            field = model.model_fields[step]
            model = next(_models(field.annotation), model)
        elif fault["type"] == "extra_forbidden" and place == len(fault["loc"]) - 1:
            name = one_line(step, limit=80)
            path += f".{name}" if path else name
    return model, path, field


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    """The models in an annotation."""
    annotation = getattr(annotation, "__value__", annotation)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _models(part)


def _range(notes: list[Any]) -> str:
    """Of a whole number, from a field's metadata."""
    low, high = (next((getattr(note, end) for note in notes if hasattr(note, end)), None) for end in ("ge", "le"))
    return "" if low is None or high is None else f" from {low} to {high}"


def _wanted(fault: ErrorDetails) -> str:
    """A description of valid values, from pydantic's kind of fault."""
    context: dict[str, Any] = fault.get("ctx", {})
    match fault["type"]:
        case "int_type":
            return "be a whole number"
        case "float_type" | "finite_number":
            return "be a finite number"
        case "string_type":
            return "be a string"
        case "bool_type":
            return "be true or false"
        case "list_type":
            return "be a list"
        case "dict_type" | "model_type":
            return "be an object"
        case "literal_error":
            return f"be {context['expected']}"
        case "greater_than_equal":
            return f"be at least {context['ge']}"
        case "less_than_equal" | "less_than":
            return f"be at most {context['le'] if 'le' in context else context['lt'] - 1}"
        case "too_long":
            return f"have at most {context['max_length']} entries"
        case "string_too_long":
            return f"have at most {context['max_length']} characters"
        case "too_short" | "string_too_short":
            return "not be empty"
        case _:
            return f"be valid: {one_line(fault['msg'], limit=120)}"
