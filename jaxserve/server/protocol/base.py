# SPDX-License-Identifier: Apache-2.0
"""What all request bodies have in common: strict values, no unknown fields, and errors that name the field.

Fields of other servers that this one does not have are declared too, as NotYet: sent with a value they are refused
by name, never ignored.
"""

from collections.abc import Iterator
from difflib import get_close_matches
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from jaxserve.errors import one_line
from jaxserve.server.errors import ApiError, bad_request
from jaxserve.server.protocol import bounds

MAX_NAME = 1024  # characters
MAX_CALL_ID = 64
MAX_MODEL_NAME = 4096

Name = Annotated[str, Field(max_length=MAX_NAME)]
NEVER = "Not supported yet: false or null alone is taken."
NotYet = Annotated[None, Field(description="Not supported yet: null alone is taken.")]
NeverTrue = Annotated[Literal[False] | None, Field(description=NEVER)]


class Part(BaseModel):
    """A part of a body: an object of its own."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, frozen=True, hide_input_in_errors=True)


class Body(Part):
    """A whole body."""

    model: Annotated[str | None, Field(max_length=MAX_MODEL_NAME, description="One of /v1/models; or none.")] = None


def parse[B: BaseModel](kind: type[B], raw: bytes, *, allow_unknown: bool = False) -> B:
    """The body as an object; an ApiError that says what is wrong with it."""
    unknown = bounds.check(raw, kind.model_fields)
    if unknown is not None and not allow_unknown:
        raise _unknown(one_line(unknown, limit=80), unknown, kind)
    try:
        return kind.model_validate_json(raw, extra="ignore" if allow_unknown else None)
    except ValidationError as error:
        raise told(error, kind) from None


def told(error: ValidationError, kind: type[BaseModel]) -> ApiError:
    """The most telling fault, in a sentence or two."""
    faults = error.errors(include_url=False, include_input=False, include_context=True)
    fault = min(faults, key=lambda fault: (_FIRST.get(fault["type"], 4), len(fault["loc"])))
    if fault["type"] == "json_invalid":
        reason = one_line(str(fault.get("ctx", {}).get("error", "")), limit=120)
        return bad_request(None, f"the body is no valid JSON: {reason}", "send one JSON object in UTF-8")
    if fault["type"] == "model_type" and not fault["loc"]:
        return bad_request(None, "the body is no JSON object", 'send an object: {"model": …}')
    if fault["type"] == "value_error":  # of a validator of ours, whose text says it all
        problem, _, hint = str(fault.get("ctx", {}).get("error", "")).partition("; ")
        name = problem.split(" ", 1)[0]
        return bad_request(name if name.split(".")[0] in kind.model_fields else None, problem, hint)
    model, path, field = _place(kind, fault)
    if fault["type"] == "extra_forbidden":
        return _unknown(path, str(fault["loc"][-1]), model)
    if fault["type"] == "missing":
        return bad_request(path, f"{path} is missing", "give one")
    wanted = (field.description if field is not None else None) or ""
    if fault["type"] == "none_required" or wanted == NEVER:
        return bad_request(path, f"{path} is not supported yet", "leave it out")
    several = len({each["loc"] for each in faults if each["loc"][:1] == fault["loc"][:1]}) > 1
    if wanted and (several or fault["type"] == "literal_error"):
        wanted = f"be {wanted[:1].lower()}{wanted[1:]}"
    else:
        wanted = _wanted(fault)
    return ApiError(400, f"{path} must {wanted.rstrip('.')}.", param=path)


# Of several faults the first of these kinds: a value that is refused by name, a name that is misspelled, which is
# often why another is missing.
_FIRST = {"json_invalid": 0, "none_required": 1, "literal_error": 2, "extra_forbidden": 3, "missing": 5}


def _unknown(path: str, name: str, model: type[BaseModel]) -> ApiError:
    close = get_close_matches(name[:80], model.model_fields, n=1)
    hint = f"did you mean {close[0]}?" if close else "leave it out, or start the server with --allow-unknown-fields"
    return bad_request(path, f"unknown field: {path}", hint)


def _place(kind: type[BaseModel], fault: ErrorDetails) -> tuple[type[BaseModel], str, FieldInfo | None]:
    """Where a fault is: the model, the way there as clients write it, the field.

    pydantic's own way there also names the members of unions that it tried, and keys; those are no fields.
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
    """The models within an annotation."""
    annotation = getattr(annotation, "__value__", annotation)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _models(part)


def _wanted(fault: ErrorDetails) -> str:
    """What was expected there."""
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
