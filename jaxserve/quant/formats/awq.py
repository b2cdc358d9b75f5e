# SPDX-License-Identifier: Apache-2.0
"""AutoAWQ's checkpoints: 4 bits with zero points in groups of columns, for its `gemm` kernels.

qweight  int32 [columns, rows / 8]            eight rows in a word, in the order _ROWS
qzeros   int32 [columns / group, rows / 8]    likewise
scales   float16 [columns / group, rows]
"""

import numpy as np

from jaxserve.quant import packing, schemes
from jaxserve.quant.formats.format import Array, Base, Source, not_scales
from jaxserve.quant.scheme import Component, Scheme

_ROWS = (0, 4, 1, 5, 2, 6, 3, 7)  # where the next row's 4 bits are


class Awq(Base):
    name, codes = "AWQ", ".qweight"
    ignored = (*Base.ignored, r"\.qzeros$")  # of weights without zero points

    def scheme(self, layer: str) -> Scheme | None:
        if not self.is_quantized(layer):
            return None
        settings = self.settings
        if (bits := settings.get("bits", settings.get("w_bit", 4))) != 4:
            self.refuse(f"{bits} bits", "use a checkpoint of 4 bits")
        if (version := str(settings.get("version", "gemm")).lower()) != "gemm":
            self.refuse(f"version {version!r}", "use a checkpoint of version gemm")
        group = self.group(settings.get("group_size", settings.get("q_group_size", 128)))
        if shape := self.shape(layer, self.codes):
            self._check(layer, shape, group)
        zeros = bool(settings.get("zero_point", True))
        scales = self.floats(layer, ".scales", "float16")
        return schemes.in_groups(bits=4, group=group, scales=scales, signed=not zeros, zeros="uint8" if zeros else None)

    def _check(self, layer: str, shape: tuple[int, ...], group: int | None) -> None:
        if len(shape) != 2:
            self.fail(layer + self.codes, f"has shape {list(shape)}, expected 2 axes")
        columns, words = shape
        self.check_group(layer, columns, group)
        groups = 1 if group is None else columns // group
        self.check_shape(layer + ".scales", (groups, words * 8))
        self.check_shape(layer + ".qzeros", (groups, words))

    def source(self, layer: str, component: Component) -> Source:
        match component.name:
            case schemes.CODES:
                return Source(suffix=self.codes, unpack=_signed if component.dtype == "int8" else _codes)
            case schemes.ZEROS:
                return Source(suffix=".qzeros", unpack=_zeros)
            case _:
                return Source(suffix=".scales", unpack=np.transpose, problem=not_scales)


def _in_order(words: Array) -> Array:
    """[m, rows / 8] -> [m, rows]"""
    values = packing.bits_of(words, 4).reshape(*words.shape, 8)
    return values[..., _ROWS].reshape(len(words), -1)


def _codes(words: Array) -> Array:
    values = _in_order(words)
    return (values[0::2] | values[1::2] << np.uint8(4)).T


def _signed(words: Array) -> Array:
    return (_codes(words) ^ np.uint8(0x88)).view(np.int8)  # of both codes, 8 less


def _zeros(words: Array) -> Array:
    return _in_order(words).T
