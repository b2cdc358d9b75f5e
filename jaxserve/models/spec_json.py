# SPDX-License-Identifier: Apache-2.0
"""A spec as JSON, which stands beside a converted checkpoint."""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, cast

from jaxserve.errors import CheckpointError
from jaxserve.models import spec
from jaxserve.quant.scheme import Component, Quantized, Scheme

_SPEC: list[Any] = [kind for kind in vars(spec).values() if is_dataclass(kind) and isinstance(kind, type)]
_CLASSES: dict[str, type] = {kind.__name__: kind for kind in (*_SPEC, Component, Scheme, Quantized)}
_CLASSES["Linear"] = spec.LinearScaling  # its name in checkpoints that earlier versions converted


def to_json(node: Any) -> Any:
    """Convert to plain dicts, lists and numbers; `from_json` restores an equal spec."""
    if isinstance(node, tuple):
        return [to_json(item) for item in cast(tuple[Any, ...], node)]
    if is_dataclass(node):
        return {"is": type(node).__name__} | {field.name: to_json(getattr(node, field.name)) for field in fields(node)}
    return node


def from_json(node: Any) -> Any:
    if isinstance(node, list):
        return tuple(from_json(item) for item in cast(list[Any], node))
    if isinstance(node, dict):
        content = {str(key): from_json(value) for key, value in cast(Mapping[Any, Any], node).items()}
        name = content.pop("is", None)
        try:
            return _CLASSES[str(name)](**content)
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"the stored spec does not fit this version: {error}", "convert again") from None
    return node
