# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of compressed-tensors, as llm-compressor writes them.

pack-quantized     weight_packed int32 [rows, columns * bits / 32]: a stream of bits along the columns; weight_scale
                   [rows, columns / group]; weight_zero_point int32 [rows * bits / 32, columns / group]: a stream along
                   the rows; weight_g_idx int32 [columns]; weight_shape
int-quantized      weight int8 [rows, columns]; weight_scale, weight_zero_point int8
float-quantized    weight float8 [rows, columns]; weight_scale [1], [rows, 1] or of blocks
nvfp4-pack-quantized    weight_packed uint8 [rows, columns / 2]; weight_scale float8; weight_global_scale: a divisor
mxfp4-pack-quantized    weight_packed uint8; weight_scale uint8: exponents

What a layer's tensors are says in which of these it is stored.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from typing import Literal, cast

import numpy as np

from jaxserve.errors import one_line
from jaxserve.quant import packing, schemes
from jaxserve.quant.formats import scales
from jaxserve.quant.formats.format import (
    KV_SCALES,
    Array,
    Header,
    Settings,
    Source,
    Tensors,
    matches,
    not_scales,
    out_of_range,
    strings,
)
from jaxserve.quant.formats.fp8 import E4M3, E5M2, NOT_ACTIVATIONS, Float8Weights
from jaxserve.quant.formats.mxfp4 import not_exponents
from jaxserve.quant.formats.scales import Block
from jaxserve.quant.scheme import Component, Scheme

type Stored = Literal["packed", "int", "float", "nvfp4", "mxfp4", "mxfp8"]

_BY_FORMAT: dict[str, Stored] = {
    "pack-quantized": "packed",
    "int-quantized": "int",
    "float-quantized": "float",
    "naive-quantized": "float",
    "nvfp4-pack-quantized": "nvfp4",
    "mxfp4-pack-quantized": "mxfp4",
    "mxfp8-quantized": "mxfp8",
}
_FORMATS = (*_BY_FORMAT, "mixed-precision", "dense")
_PACKED, _PLAIN, _SCALE, _ZERO = ".weight_packed", ".weight", ".weight_scale", ".weight_zero_point"


class CompressedTensors(Float8Weights):
    name = "compressed-tensors"
    ignored = (
        KV_SCALES,
        r"\.(weight_shape|input_scale|input_zero_point|input_global_scale|output_scale|output_zero_point)$",
        r"\.weight_(zero_point|g_idx)$",  # of symmetric codes; of groups in their order
    )

    def __init__(self, settings: Settings, tensors: Tensors) -> None:
        super().__init__(settings, tensors)
        if settings.get("transform_config"):
            self.refuse("transform_config", "use a checkpoint without transforms of activations")
        sparsity = settings.get("sparsity_config")
        if isinstance(sparsity, Mapping) and cast(Settings, sparsity).get("format", "dense") != "dense":
            self.refuse("sparsity", "use a checkpoint that is quantized only")
        groups = settings.get("config_groups")
        self._groups = list(_groups(cast(Settings, groups if isinstance(groups, Mapping) else {})))
        for each in (settings.get("format"), *(group.get("format") for group in self._groups)):
            if each is not None and each not in _FORMATS:
                self.refuse(f"format {one_line(repr(each))}", f"use a checkpoint of {', '.join(_FORMATS)}")

    @property
    def notes(self) -> Sequence[str]:
        quantized = any(group.get("input_activations") for group in self._groups)
        found = [f"{self.name}: {NOT_ACTIVATIONS.replace('8 bits', 'fewer bits')}"] if quantized else []
        if self.settings.get("kv_cache_scheme"):
            found.append(f"{self.name}: the KV cache keeps its dtype, although the checkpoint has scales for 8 bits")
        return found

    # --- which layers, and how -----------------------------------------------------------------------------------

    def is_quantized(self, layer: str) -> bool:
        if layer + _PACKED in self.tensors:
            return True
        return super().is_quantized(layer) and bool(self._weights(layer))

    def holds_codes(self, header: Header) -> bool:
        return header.dtype in ("I8", E4M3, E5M2)

    def _group(self, layer: str) -> Settings:
        """The config group of a layer: one that has its name, or a pattern of it, or else its class."""
        ranked: list[tuple[int, Settings]] = []
        for group in self._groups:
            for target in strings(group.get("targets")):
                if target == layer:
                    ranked.append((0, group))
                elif target.startswith("re:"):
                    ranked += [(1, group)] if matches(target.removeprefix("re:"), layer) else []
                elif "." not in target:  # a class, most often Linear
                    ranked.append((2, group))
        return min(ranked, key=lambda pair: pair[0])[1] if ranked else {}

    def _weights(self, layer: str) -> Settings:
        found = self._group(layer).get("weights")
        return cast(Settings, found) if isinstance(found, Mapping) else {}

    def _stored(self, layer: str) -> Stored:
        for suffix in (_PACKED, _PLAIN):
            if layer + suffix in self.tensors:
                dtype = self.tensors[layer + suffix].dtype
                scale = self.tensors[layer + _SCALE].dtype if layer + _SCALE in self.tensors else ""
                if suffix == _PACKED:
                    return "packed" if dtype == "I32" else "mxfp4" if scale in ("U8", "F8_E8M0") else "nvfp4"
                return "int" if dtype == "I8" else "mxfp8" if scale in ("U8", "F8_E8M0") else "float"
        named = str(self._group(layer).get("format") or self.settings.get("format"))
        return _BY_FORMAT.get(named, "packed")

    def _bits(self, layer: str) -> int:
        bits = self._weights(layer).get("num_bits", 8)
        if not isinstance(bits, int) or not 2 <= bits <= 8:
            self.refuse(f"num_bits {one_line(repr(bits))}", "use a checkpoint of 2 to 8 bits")
        return bits

    def _size(self, layer: str) -> int | None:
        """Columns that share a scale; None: whole rows."""
        weights = self._weights(layer)
        strategy = weights.get("strategy")
        return self.group(weights.get("group_size")) if strategy in ("group", "tensor_group", None) else None

    def block(self, layer: str) -> Block | None:
        weights = self._weights(layer)
        if weights.get("strategy") == "block":
            return self.pair("block_structure", weights.get("block_structure"))
        group = self._size(layer)
        return None if group is None else (1, group)

    # --- schemes -------------------------------------------------------------------------------------------------

    def scheme(self, layer: str) -> Scheme | None:
        if not self.is_quantized(layer):
            return None
        match self._stored(layer):
            case "packed":
                return self._packed(layer)
            case "int":
                return self._int(layer)
            case "float":
                return self.float8(layer)
            case "mxfp8":
                return schemes.float8(group=32, scales="uint8")
            case "nvfp4":
                self._check_fp4(layer, 16)
                return schemes.table("e2m1", group=16, scales="float8_e4m3fn", row_scales=True)
            case "mxfp4":
                self._check_fp4(layer, 32)
                return schemes.table("e2m1", group=32, scales="uint8")

    def _check_fp4(self, layer: str, group: int) -> None:
        if shape := self.shape(layer, _PACKED):
            rows, half = self.matrix(layer, shape)
            self.check_group(layer, half * 2, group)
            self.check_shape(layer + _SCALE, (rows, half * 2 // group))

    def _packed(self, layer: str) -> Scheme:
        bits, group, zeros = self._bits(layer), self._size(layer), not self._weights(layer).get("symmetric", True)
        if shape := self.shape(layer, _PACKED):
            rows, words = self.matrix(layer, shape)
            columns = self._columns(layer)
            if words != -(-columns * bits // 32):
                wanted = f"expected [{rows}, {-(-columns * bits // 32)}] for {columns} columns of {bits} bits"
                self.fail(layer + _PACKED, f"has shape {list(shape)}, {wanted}")
            self.check_group(layer, columns, group)
            self._check_scales(layer, rows, columns, group)
            if zeros:
                groups = 1 if group is None else columns // group
                self.check_shape(layer + _ZERO, (-(-rows * bits // 32), groups))
        return schemes.in_groups(
            bits=bits,
            group=group,
            scales=self.floats(layer, _SCALE, "bfloat16"),
            signed=not zeros,
            zeros="uint8" if zeros else None,
            ordered=group is not None and layer + ".weight_g_idx" in self.tensors,
        )

    def _int(self, layer: str) -> Scheme:
        bits, group = self._bits(layer), self._size(layer)
        zeros = not self._weights(layer).get("symmetric", True)
        if shape := self.shape(layer, _PLAIN):
            rows, columns = self.matrix(layer, shape)
            self.check_group(layer, columns, group)
            self._check_scales(layer, rows, columns, group)
        if bits > 4 and group is None and not zeros:
            return schemes.INT8
        scales = self.floats(layer, _SCALE, "float32")
        return schemes.in_groups(bits=bits, group=group, scales=scales, signed=True, zeros="int8" if zeros else None)

    def _check_scales(self, layer: str, rows: int, columns: int, group: int | None) -> None:
        shape = self.shape(layer, _SCALE)
        wanted = (rows, 1 if group is None else columns // group)
        if shape is not None and shape != wanted and not (group is None and math.prod(shape) in (1, rows)):
            self.fail(layer + _SCALE, f"has shape {list(shape)}, expected {list(wanted)}")

    def _columns(self, layer: str) -> int:
        """Of a packed weight, whose last word may have bits of no column."""
        group, shape = self._size(layer), self.shape(layer, _SCALE)
        if group is not None and shape is not None and len(shape) == 2:
            return shape[1] * group
        if layer + ".weight_shape" in self.tensors:
            return int(self.tensors.small(layer + ".weight_shape").reshape(-1)[-1])
        return (self.shape(layer, _PACKED) or (0, 0))[1] * 32 // self._bits(layer)

    # --- sources -------------------------------------------------------------------------------------------------

    def source(self, layer: str, component: Component) -> Source:
        stored = self._stored(layer)
        match component.name:
            case schemes.CODES:
                return self._codes(layer, component, stored)
            case schemes.SCALES:
                return self._scales(layer, stored)
            case schemes.ZEROS if stored == "packed":
                rows = (self.shape(layer, _PACKED) or (0,))[0]
                return Source(suffix=_ZERO, unpack=_zeros(self._bits(layer), rows))
            case schemes.ZEROS:
                return Source(suffix=_ZERO, unpack=_rows_of((self.shape(layer, _PLAIN) or (1,))[0]))
            case schemes.ORDER:
                groups = (self.shape(layer, _SCALE) or (0, 1))[1]
                return Source(suffix=".weight_g_idx", problem=_range(groups))
            case _:
                rows = (self.shape(layer, _PACKED) or (1,))[0]
                unpack = scales.spread(rows, 1, None, inverse=True)
                return Source(suffix=".weight_global_scale", unpack=unpack, problem=not_scales)

    def _codes(self, layer: str, component: Component, stored: Stored) -> Source:
        if stored == "packed":
            unpack = _codes(self._bits(layer), self._columns(layer), component.dtype == "int8")
            return Source(suffix=_PACKED, unpack=unpack)
        if stored == "int" and component.columns != 1:
            return Source(suffix=_PLAIN, unpack=_narrowed(self._bits(layer)))
        return Source(suffix=_PACKED if stored in ("nvfp4", "mxfp4") else _PLAIN)

    def _scales(self, layer: str, stored: Stored) -> Source:
        if stored in ("mxfp4", "mxfp8"):
            return Source(suffix=_SCALE, unpack=_exponents, problem=not_exponents)
        rows, columns = (*(self.shape(layer, _PLAIN) or self.shape(layer, _PACKED) or (1, 1)), 1)[:2]
        if stored == "float":
            unpack = scales.spread(rows, columns, self.block(layer))
            return Source(suffix=_SCALE, unpack=unpack, problem=not_scales)
        one = math.prod(self.shape(layer, _SCALE) or ()) == 1
        return Source(suffix=_SCALE, unpack=_rows_of(rows) if one else None, problem=not_scales)


def _groups(groups: Settings) -> Iterator[Settings]:
    for group in groups.values():
        if isinstance(group, Mapping):
            yield cast(Settings, group)


_range = cache(out_of_range)


@cache
def _codes(bits: int, columns: int, signed: bool) -> Callable[[Array], Array]:
    def unpack(words: Array) -> Array:
        return packing.codes_of(words, bits, columns, signed=signed)

    return unpack


@cache
def _narrowed(bits: int) -> Callable[[Array], Array]:
    def unpack(values: Array) -> Array:
        return packing.pack(values, bits)

    return unpack


@cache
def _zeros(bits: int, rows: int) -> Callable[[Array], Array]:
    def unpack(words: Array) -> Array:
        return packing.bits_of(words.T, bits)[:, :rows].T

    return unpack


@cache
def _rows_of(rows: int) -> Callable[[Array], Array]:
    """Of one value for all rows."""

    def unpack(stored: Array) -> Array:
        return np.broadcast_to(stored.reshape(-1), (rows,)) if stored.size == 1 else stored

    return unpack


def _exponents(stored: Array) -> Array:
    return stored.view(np.uint8)
