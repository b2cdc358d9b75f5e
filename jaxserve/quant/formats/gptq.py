# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of AutoGPTQ and GPTQModel: 2, 3, 4 or 8 bits in groups of columns.

qweight  int32 [columns * bits / 32, rows]            a stream of bits along the columns
qzeros   int32 [columns / group, rows * bits / 32]    a stream along the rows; in format v1, one less than the value
scales   float16 [columns / group, rows]
g_idx    int32 [columns]                              the group of each column
"""

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, cast

import numpy as np

from jaxserve.errors import one_line
from jaxserve.quant import packing, schemes
from jaxserve.quant.formats.format import Array, Base, Source, matches, not_scales, out_of_range
from jaxserve.quant.scheme import Component, Scheme

BITS = (2, 3, 4, 8)
_VERSIONS = ("gptq", "gptq_v2")


class Gptq(Base):
    name, codes = "GPTQ", ".qweight"
    ignored = (*Base.ignored, r"\.(qzeros|g_idx)$")  # of symmetric codes; of groups in their order

    def scheme(self, layer: str) -> Scheme | None:
        settings = self._settings(layer)
        if settings is None or not self.is_quantized(layer):
            return None
        bits, group = settings.get("bits", 4), self.group(settings.get("group_size", 128))
        if bits not in BITS:
            self.refuse(f"{one_line(repr(bits))} bits", f"use a checkpoint of {', '.join(map(str, BITS))} bits")
        if self._version not in _VERSIONS:
            self.refuse(f"checkpoint_format {self._version!r}", f"use a checkpoint of {' or '.join(_VERSIONS)}")
        if shape := self.shape(layer, self.codes):
            self._check(layer, shape, bits, group)
        symmetric = bool(settings.get("sym", True))
        return schemes.in_groups(
            bits=bits,
            group=group,
            scales=self.floats(layer, ".scales", "float16"),
            signed=symmetric,
            zeros=None if symmetric else "uint8",
            ordered=bool(settings.get("desc_act")) and group is not None and self.has(layer, ".g_idx", by_default=True),
        )

    @property
    def _version(self) -> str:
        return str(self.settings.get("checkpoint_format", self.settings.get("format", "gptq"))).lower()

    def _settings(self, layer: str) -> Mapping[str, Any] | None:
        """The settings of a layer: `dynamic` may have others for names that a pattern matches, or skip them (-:)."""
        dynamic = self.settings.get("dynamic")
        for pattern, others in cast(Mapping[str, Any], dynamic if isinstance(dynamic, Mapping) else {}).items():
            if pattern.startswith("-:"):
                if matches(pattern.removeprefix("-:"), layer):
                    return None
            elif matches(pattern.removeprefix("+:"), layer):
                return {**self.settings, **(others if isinstance(others, Mapping) else {})}
        return self.settings

    def _check(self, layer: str, shape: tuple[int, ...], bits: int, group: int | None) -> None:
        if len(shape) != 2 or shape[0] * 32 % bits:
            self.fail(layer + self.codes, f"has shape {list(shape)}, expected [columns * {bits} / 32, rows]")
        columns, rows = shape[0] * 32 // bits, shape[1]
        self.check_group(layer, columns, group)
        groups = 1 if group is None else columns // group
        self.check_shape(layer + ".scales", (groups, rows))
        self.check_shape(layer + ".qzeros", (groups, -(-rows * bits // 32)))
        self.check_shape(layer + ".g_idx", (columns,))

    def source(self, layer: str, component: Component) -> Source:
        settings = self._settings(layer) or self.settings
        bits = int(settings.get("bits", 4))
        match component.name:
            case schemes.CODES:
                return Source(suffix=self.codes, unpack=_codes(bits, component.dtype == "int8"))
            case schemes.ZEROS:
                rows = (self.shape(layer, ".scales") or (0, 0))[1]
                return Source(suffix=".qzeros", unpack=_zeros(bits, rows, int(self._version == "gptq")))
            case schemes.ORDER:
                groups = (self.shape(layer, ".scales") or (1,))[0]
                return Source(suffix=".g_idx", problem=_range(groups))
            case _:
                return Source(suffix=".scales", unpack=np.transpose, problem=not_scales)


_range = cache(out_of_range)


@cache
def _codes(bits: int, signed: bool) -> Callable[[Array], Array]:
    def unpack(words: Array) -> Array:
        return packing.codes_of(words.T, bits, len(words) * 32 // bits, signed=signed)

    return unpack


@cache
def _zeros(bits: int, rows: int, less: int) -> Callable[[Array], Array]:
    def unpack(words: Array) -> Array:
        values = packing.bits_of(words, bits)[:, :rows]
        # Without the mask, a zero point of 0, which v1 stores as the largest number, would be out of range.
        return ((values + np.uint8(less)) & np.uint8((1 << bits) - 1)).T

    return unpack
