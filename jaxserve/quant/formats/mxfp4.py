# SPDX-License-Identifier: Apache-2.0
"""gpt-oss' checkpoints, whose experts are in MXFP4: 4-bit floats with an exponent for each 32 columns.

gate_up_proj_blocks   uint8 [experts, 2 * width, hidden / 32, 16]: rows of gate and up alternate; the first column of a
                      byte is in its low bits
gate_up_proj_scales   uint8 [experts, 2 * width, hidden / 32]
down_proj_blocks      uint8 [experts, hidden, width / 32, 16], and its scales
"""

import numpy as np

from jaxserve.quant import schemes
from jaxserve.quant.formats.format import Array, Base, Header, Source
from jaxserve.quant.scheme import Component, Scheme

_GROUP = 32


class Mxfp4(Base):
    name, codes = "MXFP4", "_blocks"

    def holds_codes(self, header: Header) -> bool:
        return header.dtype == "U8"

    def scheme(self, layer: str) -> Scheme | None:
        if ".experts." not in layer or not self.is_quantized(layer):
            return None
        if shape := self.shape(layer, self.codes):
            if len(shape) != 4 or shape[-1] * 2 != _GROUP:
                wanted = f"expected [experts, rows, columns / {_GROUP}, {_GROUP // 2}]"
                self.fail(layer + self.codes, f"has shape {list(shape)}, {wanted}")
            self.check_shape(layer + "_scales", shape[:-1])
        return schemes.table("e2m1", group=_GROUP, scales="uint8")

    def source(self, layer: str, component: Component) -> Source:
        if component.name == schemes.CODES:
            return Source(suffix=self.codes, unpack=_codes)
        return Source(suffix="_scales", unpack=_turned, problem=not_exponents)


def not_exponents(values: Array) -> str | None:
    """The fault of exponents of scales, in 8 bits without a sign."""
    return "has the exponent 255, which stands for NaN, expected scales" if (values == 255).any() else None


def _codes(blocks: Array) -> Array:
    return _turned(blocks.reshape(*blocks.shape[:2], -1))


def _turned(values: Array) -> Array:
    """With rows last, as plain checkpoints of this model store experts."""
    return np.swapaxes(values, -1, -2)
