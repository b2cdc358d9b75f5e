# SPDX-License-Identifier: Apache-2.0
"""Formats of quantized checkpoints, by the quant_method of their quantization_config."""

from jaxserve.quant.formats.awq import Awq
from jaxserve.quant.formats.bitsandbytes import BitsAndBytes
from jaxserve.quant.formats.compressed_tensors import CompressedTensors
from jaxserve.quant.formats.format import Opener
from jaxserve.quant.formats.fp8 import Fbgemm, Fp8
from jaxserve.quant.formats.gptq import Gptq
from jaxserve.quant.formats.modelopt import ModelOpt
from jaxserve.quant.formats.mxfp4 import Mxfp4

FORMATS: dict[str, Opener] = {
    "awq": Awq,
    "bitsandbytes": BitsAndBytes,
    "compressed-tensors": CompressedTensors,
    "fbgemm_fp8": Fbgemm,
    "fp8": Fp8,
    "gptq": Gptq,
    "modelopt": ModelOpt,
    "mxfp4": Mxfp4,
}
