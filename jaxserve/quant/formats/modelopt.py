# SPDX-License-Identifier: Apache-2.0
"""NVIDIA ModelOpt's checkpoints: 8-bit floats, and NVFP4, of which only weights are 4-bit here.

FP8     weight float8_e4m3 [rows, columns]; weight_scale float32 [], [rows], or of blocks
NVFP4   weight uint8 [rows, columns / 2], the first column in the low bits; weight_scale float8_e4m3
        [rows, columns / 16]; weight_scale_2 float32 [], by which scales are multiplied
"""

from collections.abc import Mapping, Sequence
from typing import Any, cast

from jaxserve.quant import schemes
from jaxserve.quant.formats import scales
from jaxserve.quant.formats.format import Header, Settings, Source, Tensors, not_scales
from jaxserve.quant.formats.fp8 import NOT_ACTIVATIONS, Float8Weights
from jaxserve.quant.formats.scales import Block
from jaxserve.quant.scheme import Component, Scheme

_BLOCK = 128
_GROUP = 16
ALGORITHMS = (
    *("FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO", "FP8_PB_REAL"),
    *("NVFP4", "W4A16_NVFP4", "MIXED_PRECISION"),
)


class ModelOpt(Float8Weights):
    name = "ModelOpt"

    def __init__(self, settings: Settings, tensors: Tensors) -> None:
        inner = settings.get("quantization")  # in hf_quant_config.json
        super().__init__(cast(Mapping[str, Any], inner) if isinstance(inner, Mapping) else settings, tensors)
        self._algorithm = str(self.settings.get("quant_algo", "")).upper()
        if self._algorithm not in ALGORITHMS:
            self.refuse(f"quant_algo {self._algorithm!r}", f"use a checkpoint of {', '.join(ALGORITHMS)}")

    @property
    def notes(self) -> Sequence[str]:
        weights_alone = self._algorithm in ("FP8_PB_WO", "W4A16_NVFP4")
        return () if weights_alone else (f"{self.name}: {NOT_ACTIVATIONS.replace('8 bits', '4 or 8 bits')}",)

    def holds_codes(self, header: Header) -> bool:
        return header.dtype == "U8" or super().holds_codes(header)

    def _is_nvfp4(self, layer: str) -> bool:
        if layer + self.codes in self.tensors:
            return self.tensors[layer + self.codes].dtype == "U8"
        return "NVFP4" in self._algorithm

    def block(self, layer: str) -> Block | None:
        return (_BLOCK, _BLOCK) if self._algorithm in ("FP8_PB_WO", "FP8_PB_REAL", "MIXED_PRECISION") else None

    def scheme(self, layer: str) -> Scheme | None:
        if not self.is_quantized(layer):
            return None
        if not self._is_nvfp4(layer):
            return self.float8(layer)
        if shape := self.shape(layer, self.codes):
            rows, columns = self.matrix(layer, shape)
            self.check_group(layer, columns * 2, _GROUP)
            self.check_shape(layer + ".weight_scale", (rows, columns * 2 // _GROUP))
        return schemes.table("e2m1", group=_GROUP, scales="float8_e4m3fn", row_scales=True)

    def source(self, layer: str, component: Component) -> Source:
        if not self._is_nvfp4(layer):
            return super().source(layer, component)
        match component.name:
            case schemes.CODES:
                return Source(suffix=self.codes)
            case schemes.SCALES:
                return Source(suffix=".weight_scale", problem=not_scales)
            case _:
                rows = (self.shape(layer, self.codes) or (1,))[0]
                return Source(suffix=".weight_scale_2", unpack=scales.spread(rows, 1, None), problem=not_scales)
