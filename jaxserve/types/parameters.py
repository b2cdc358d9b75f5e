# SPDX-License-Identifier: Apache-2.0
"""How a sampling parameter is declared: everything the package knows about it, beside its field in a dataclass.

`parameter` stands where a dataclass field has its default; `declared` collects the parameters of a dataclass.
"""

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any, Literal

from jaxserve.types.checks import ValueKind

type RowDtype = Literal["float32", "int32", ""]


class Acts(Enum):
    """Where a parameter takes effect."""

    REQUEST = "request"  # in the scheduler: how many samples and tokens, what ends them, what is reported about them
    TEXT = "text"  # in detokenizing
    ROW = "row"  # in the sampling kernel: a number for each row of a step
    CONTROL = "control"  # on the logits before sampling: sent when a request gets its row
    MASK = "mask"  # the same, by allowing only some tokens


_UNSET: Any = object()


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameter:
    name: str = ""
    given: Any  # the default, as the dataclass has it
    default: Any  # the same, checked
    kind: ValueKind
    about: str
    acts: Acts
    off: Any  # the value without effect
    optional: bool  # None is a value
    then: Callable[[Any], Any] | None  # applied to a checked value
    dtype: RowDtype  # on the device, if it acts on rows
    from_model: bool  # a model's generation_config.json may set its default
    sent: bool  # a field of HTTP requests, with the same meaning
    embeds: bool  # accepted in requests for embeddings
    beams: bool  # can be combined with beam search

    def check(self, value: object) -> Any:
        """The value as it is kept; a RequestError for a bad one."""
        if value is self.given:  # nearly always
            return self.default
        return self._checked(value)

    def _checked(self, value: object) -> Any:
        if value is None and self.optional:
            return None
        checked = self.kind(self.name, value)
        return checked if self.then is None else self.then(checked)

    def named(self, name: str) -> "Parameter":
        made = replace(self, name=name)
        default = made._checked(self.given)
        return replace(made, default=default, off=default if self.off is _UNSET else self.off)


def parameter[T](
    default: T,
    kind: ValueKind,
    about: str,
    *,
    acts: Acts = Acts.REQUEST,
    off: Any = _UNSET,
    optional: bool = False,
    then: Callable[[Any], Any] | None = None,
    dtype: RowDtype = "",
    from_model: bool = False,
    sent: bool = True,
    embeds: bool = True,
    beams: bool | None = None,
) -> T:
    """A dataclass field. `off` is the default unless given, `beams` false for what acts on logits or rows."""
    assert bool(dtype) == (acts is Acts.ROW)
    made = Parameter(
        given=default,
        default=_UNSET,
        kind=kind,
        about=about,
        acts=acts,
        off=off,
        optional=optional,
        then=then,
        dtype=dtype,
        from_model=from_model,
        sent=sent,
        embeds=embeds,
        beams=acts not in (Acts.ROW, Acts.CONTROL, Acts.MASK) if beams is None else beams,
    )
    return dataclasses.field(default=default, metadata={Parameter: made})


def declared(cls: type) -> tuple[Parameter, ...]:
    """The parameters of a dataclass, in order; those without a default are not among them."""
    found = dataclasses.fields(cls)
    return tuple(field.metadata[Parameter].named(field.name) for field in found if Parameter in field.metadata)


def markdown_table(parameters: Iterable[Parameter]) -> str:
    """A table for the documentation: name, values, default, meaning."""
    lines = ["| parameter | value | default | meaning |", "|---|---|---|---|"]
    for each in parameters:
        default = "none" if each.default in (None, ()) else _shown(each.default)
        if each.from_model:
            default += ", or the model's"
        lines.append(f"| `{each.name}` | {each.kind.words} | {default} | {each.about} |")
    return "\n".join(lines) + "\n"


def _shown(value: object) -> str:
    if isinstance(value, Enum):
        return f"`{value}`"
    return str(value).lower() if isinstance(value, bool) else f"{value:g}"
