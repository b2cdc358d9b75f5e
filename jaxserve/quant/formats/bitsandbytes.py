# SPDX-License-Identifier: Apache-2.0
"""bitsandbytes' checkpoints: 4 bits through a table, or int8 with a scale for each row.

weight                        uint8 [rows * columns / 2, 1], the first column in the high bits; or int8 [rows, columns]
weight.absmax                 float32 or uint8 [rows * columns / blocksize]: scales
weight.nested_absmax          float32: scales of the scales, for each nested_blocksize; with weight.nested_quant_map
weight.quant_map              float32 [16]: the table
weight.quant_state.*          JSON in bytes: shape, sizes, and an offset of nested scales
SCB                           float32 [rows]: 127 times the scale
"""

import json
import math
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, Literal, cast

import numpy as np

from jaxserve.quant import schemes, tables
from jaxserve.quant.formats.format import Array, Base, Header, Settings, Source, Tensors, not_scales
from jaxserve.quant.scheme import Component, Scheme

_STATES: dict[str, Literal["nf4", "fp4"]] = {
    ".weight.quant_state.bitsandbytes__nf4": "nf4",
    ".weight.quant_state.bitsandbytes__fp4": "fp4",
}
_TYPES = ("nf4", "fp4")


class BitsAndBytes(Base):
    name, codes = "bitsandbytes", ".weight"
    ignored = (
        *Base.ignored,
        r"\.weight\.(quant_map|nested_quant_map|nested_absmax|quant_state\.[a-z0-9_]+)$",
        r"\.weight_format$",
    )

    def __init__(self, settings: Settings, tensors: Tensors) -> None:
        super().__init__(settings, tensors)
        self._states: dict[str, tuple[str, Mapping[str, Any]]] = {}

    def holds_codes(self, header: Header) -> bool:
        return header.dtype in ("U8", "I8")

    def scheme(self, layer: str) -> Scheme | None:
        if not self.is_quantized(layer):
            return None
        name = layer + self.codes
        wide = self.settings.get("load_in_8bit") if name not in self.tensors else self.tensors[name].dtype == "I8"
        if wide:
            return schemes.INT8
        if name not in self.tensors:
            kind = self.settings.get("bnb_4bit_quant_type", "fp4")
            if kind not in _TYPES:
                self.refuse(f"bnb_4bit_quant_type {kind!r}", f"use a checkpoint of {' or '.join(_TYPES)}")
            return schemes.table(kind, group=64, scales="float32")
        suffix, state = self._state(layer)
        rows, columns = state["shape"]
        if self.tensors[name].shape not in ((rows * columns // 2, 1), (1, rows * columns // 2)):
            self.fail(name, f"has shape {list(self.tensors[name].shape)}, expected {rows * columns // 2:,} bytes")
        self.check_shape(name + ".absmax", (-(-rows * columns // state["blocksize"]),))
        return schemes.table(_STATES[suffix], group=math.gcd(columns, state["blocksize"]), scales="float32")

    def _state(self, layer: str) -> tuple[str, Mapping[str, Any]]:
        """The suffix and the content of a layer's description."""
        if layer in self._states:
            return self._states[layer]
        suffix = next((each for each in _STATES if layer + each in self.tensors), None)
        if suffix is None:
            self.fail(layer + self.codes, f"has no description, expected a tensor {' or '.join(_STATES)}")
        try:
            state: Any = json.loads(self.tensors.small(layer + suffix).tobytes())
            rows, columns = state["shape"]
            sizes = [rows, columns, state["blocksize"], state.get("nested_blocksize", 1)]
            valid = all(isinstance(size, int) and size > 0 for size in sizes)
            valid = valid and isinstance(state.get("nested_offset", 0.0), int | float)
        except (ValueError, KeyError, TypeError):
            valid, state = False, {}
        if not valid:
            self.fail(layer + suffix, "is not the JSON of a quantized matrix, with shape and blocksize")
        self._states[layer] = suffix, cast(Mapping[str, Any], state)
        return self._states[layer]

    def source(self, layer: str, component: Component) -> Source:
        if component.dtype == "int8":
            return Source(suffix=self.codes)
        if layer + self.codes not in self.tensors or self.tensors[layer + self.codes].dtype == "I8":
            return Source(suffix=".SCB", unpack=_of_int8, problem=not_scales)
        suffix, state = self._state(layer)
        rows, columns = state["shape"]
        if component.name == schemes.CODES:
            return Source(suffix=self.codes, unpack=_codes(rows, columns))
        also, nested = (".weight.quant_map",), 0
        if layer + ".weight.nested_absmax" in self.tensors:
            also, nested = (*also, ".weight.nested_quant_map", ".weight.nested_absmax"), state["nested_blocksize"]
        unpack = _scales(
            _STATES[suffix], rows, columns, state["blocksize"], nested, float(state.get("nested_offset", 0.0))
        )
        return Source(suffix=".weight.absmax", unpack=unpack, also=also, problem=_wrong(_STATES[suffix]))


def _of_int8(values: Array) -> Array:
    return values.astype(np.float32) / np.float32(127)


@cache
def _wrong(kind: str) -> Callable[..., str | None]:
    def problem(absmax: Array, table: Array, *more: Array) -> str | None:
        if not np.allclose(table.reshape(-1), tables.VALUES[kind], atol=1e-6):
            return f"belongs to a quant_map with other values than those of {kind}"
        return not_scales(more[1] if more else absmax)

    return problem


@cache
def _codes(rows: int, columns: int) -> Callable[[Array], Array]:
    def unpack(stored: Array) -> Array:
        return (stored >> np.uint8(4) | stored << np.uint8(4)).reshape(rows, columns // 2)

    return unpack


@cache
def _scales(kind: str, rows: int, columns: int, block: int, nested: int, offset: float) -> Callable[..., Array]:
    def unpack(absmax: Array, table: Array, *more: Array) -> Array:
        values = absmax.astype(np.float32)
        if more:
            codes, scales = more
            values = codes[absmax] * np.repeat(scales, nested)[: absmax.size] + np.float32(offset)
        group = math.gcd(columns, block)
        values = np.repeat(values, block // group)[: rows * columns // group]
        return values.reshape(rows, columns // group)

    return unpack
