# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of 8-bit floats as DeepSeek, Qwen and transformers write them (fp8), and FBGEMM's.

weight              float8_e4m3 [rows, columns]
weight_scale_inv    float32 [rows / 128, columns / 128], rounded up: scales of blocks, by which codes are multiplied
weight_scale        float32 [] or [rows, 1]: in checkpoints without blocks
input_scale         static scales of activations, which are not quantized here
"""

from collections.abc import Sequence

from jaxserve.quant import schemes
from jaxserve.quant.formats import scales
from jaxserve.quant.formats.format import Base, Header, Settings, Source, Tensors, not_scales
from jaxserve.quant.formats.scales import Block
from jaxserve.quant.scheme import Component, Scheme

E4M3, E5M2 = "F8_E4M3", "F8_E5M2"
NOT_ACTIVATIONS = "activations keep the model's dtype, although the checkpoint has them quantized in 8 bits too"


class Float8Weights(Base):
    """A matrix of 8-bit floats with float32 scales; what formats of such checkpoints share."""

    codes = ".weight"
    ignored = (*Base.ignored, r"\.(input_scale|input_scale_ub)$")

    @property
    def notes(self) -> Sequence[str]:
        return (f"{self.name}: {NOT_ACTIVATIONS}",)

    def holds_codes(self, header: Header) -> bool:
        return header.dtype in (E4M3, E5M2)

    def block(self, layer: str) -> Block | None:
        """The rows and columns that share a scale, if blocks do."""
        return None

    def suffix(self, layer: str) -> str:
        return ".weight_scale"

    def scheme(self, layer: str) -> Scheme | None:
        if not self.is_quantized(layer):
            return None
        return self.float8(layer)

    def float8(self, layer: str) -> Scheme:
        shape, block = self.shape(layer, self.codes), self.block(layer)
        if shape is None:
            return schemes.float8(group=None)
        rows, columns = self.matrix(layer, shape)
        wide = self.tensors[layer + self.codes].dtype == E5M2
        group = self.scale_group(layer, rows, columns, block)
        return schemes.float8(group=group, codes="float8_e5m2" if wide else "float8_e4m3fn")

    def matrix(self, layer: str, shape: tuple[int, ...]) -> tuple[int, int]:
        if len(shape) != 2:
            self.fail(layer + self.codes, f"has shape {list(shape)}, expected [rows, columns]")
        return shape[0], shape[1]

    def scale_group(self, layer: str, rows: int, columns: int, block: Block | None) -> int | None:
        """The group of columns that share a scale; None: all."""
        found = self.shape(layer, self.suffix(layer))
        if found is None:
            self.fail(layer + self.codes, f"has no scales beside it, expected a tensor {self.suffix(layer)[1:]}")
        try:
            return scales.group_of(found, rows, columns, block)
        except ValueError as error:
            self.fail(layer + self.suffix(layer), f"has shape {list(found)}, expected scales: {error}")

    def source(self, layer: str, component: Component) -> Source:
        if component.name == schemes.CODES:
            return Source(suffix=self.codes)
        rows, columns = self.shape(layer, self.codes) or (1, 1)
        unpack = scales.spread(rows, columns, self.block(layer))
        return Source(suffix=self.suffix(layer), unpack=unpack, problem=not_scales)


class Fp8(Float8Weights):
    name = "fp8"

    def __init__(self, settings: Settings, tensors: Tensors) -> None:
        super().__init__(settings, tensors)
        size = settings.get("weight_block_size")
        self._block = None if size is None else self.pair("weight_block_size", size)

    def block(self, layer: str) -> Block | None:
        return self._block

    def suffix(self, layer: str) -> str:
        inverse = layer + ".weight_scale_inv" in self.tensors
        return ".weight_scale_inv" if inverse or (self._block and not self.tensors) else ".weight_scale"


class Fbgemm(Float8Weights):
    name = "FBGEMM"
