# SPDX-License-Identifier: Apache-2.0
# pyright: reportMissingImports=false, reportMissingModuleSource=false
"""Quantizes single matrices as the packers of each format do: with their own code where it runs on a CPU.

compressed-tensors and bitsandbytes are called. Of AutoAWQ and GPTQModel, whose packages want a GPU or dozens of others
to be imported, the functions that pack are taken out of the installed source. 8-bit floats, ModelOpt's and gpt-oss'
formats are written from their formulas.
"""

import ast
import contextlib
import importlib.util
import math
import types
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

Tensors = dict[str, torch.Tensor]
E4M3 = torch.float8_e4m3fn
DEQUANTIZED = "dequantized"  # what the packer's own code makes of its result


def _source(package: str, *parts: str) -> str:
    spec = importlib.util.find_spec(package)
    assert spec and spec.origin
    return Path(spec.origin).parent.joinpath(*parts).read_text()


def _linear(weight: torch.Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight.data = weight
    return linear


def asymmetric(weight: torch.Tensor, bits: int, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and zero points [rows, groups] that cover each group's values."""
    parts = weight.reshape(weight.shape[0], -1, group)
    low, high = parts.amin(-1).clamp(max=0), parts.amax(-1).clamp(min=0)
    scales = ((high - low) / (2**bits - 1)).half().float()
    return scales, torch.round(-low / scales).clamp(0, 2**bits - 1)


def symmetric(weight: torch.Tensor, bits: int, group: int) -> torch.Tensor:
    parts = weight.reshape(weight.shape[0], -1, group)
    return (parts.abs().amax(-1) / (2 ** (bits - 1) - 1)).half().float()


def awq(weight: torch.Tensor, group: int, *, zeros: bool = True) -> Tensors:
    """By AutoAWQ's WQLinear_GEMM."""
    tree = ast.parse(_source("awq", "modules", "linear", "gemm.py"))
    wanted: list[ast.stmt] = [
        node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "WQLinear_GEMM"
    ]
    scope: dict[str, Any] = {"torch": torch, "nn": nn, "get_best_device": lambda: "cpu"}
    exec(compile(ast.Module(wanted, []), "gemm.py", "exec"), scope)
    group = weight.shape[1] if group == -1 else group
    scales, points = asymmetric(weight, 4, group)
    if not zeros:
        scales, points = symmetric(weight, 4, group), torch.full_like(scales, 8)
    made = scope["WQLinear_GEMM"].from_linear(
        _linear(weight), 4, group, scales=scales.T.contiguous(), zeros=points.T.contiguous()
    )
    return {"qweight": made.qweight, "qzeros": made.qzeros, "scales": made.scales}


class _Gptq(nn.Module):
    planar, pack_dtype_bits = False, 32
    pack_np_math_dtype, pack_np_dtype = np.uint32, np.int32

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits, self.maxq, self.pack_factor = bits, 2**bits - 1, 32 // bits


def gptq(
    weight: torch.Tensor, bits: int, group: int, *, sym: bool, order: torch.Tensor | None, version: int
) -> Tensors:
    """By GPTQModel's PackableQuantLinear."""
    tree = ast.parse(_source("gptqmodel", "nn_modules", "qlinear", "__init__.py"))
    [packer] = [
        method
        for node in tree.body
        if isinstance(node, ast.ClassDef) and node.name == "PackableQuantLinear"
        for method in node.body
        if isinstance(method, ast.FunctionDef) and method.name == "pack_original"
    ]
    limits = types.SimpleNamespace(threadpool_limits=lambda count: contextlib.nullcontext())
    conv1d = types.SimpleNamespace(pytorch_utils=types.SimpleNamespace(Conv1D=nn.Conv1d))
    scope: dict[str, Any] = dict(
        t=torch, nn=nn, np=np, math=math, THREADPOOLCTL=limits, _ConvNd=nn.Conv2d, transformers=conv1d
    )
    exec(compile(ast.Module([packer], []), "qlinear.py", "exec"), scope)
    columns = weight.shape[1]
    group = columns if group == -1 else group
    groups = torch.arange(columns, dtype=torch.int32) // group if order is None else order
    sorted_by = torch.argsort(groups, stable=True)
    scales, zeros = asymmetric(weight[:, sorted_by], bits, group)
    if sym:
        scales, zeros = symmetric(weight[:, sorted_by], bits, group), torch.full_like(zeros, 2 ** (bits - 1))
    elif version == 1:
        zeros = zeros.clamp(min=1)  # v1 cannot store 0
    made: Any = _Gptq(bits)
    scope["pack_original"](made, _linear(weight), scales, zeros - int(version == 1), g_idx=groups)
    if version == 1:  # the packer was given what v1 stores, so it must not use it for codes
        again: Any = _Gptq(bits)
        scope["pack_original"](again, _linear(weight), scales, zeros, g_idx=groups)
        made.qweight = again.qweight
    return {name: getattr(made, name) for name in ("qweight", "qzeros", "scales", "g_idx")}


def compressed(weight: torch.Tensor, form: str, arguments: dict[str, Any], *, order: torch.Tensor | None) -> Tensors:
    """By the compressors of compressed-tensors."""
    from compressed_tensors.compressors.base import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    args = QuantizationArgs(**arguments)
    rows, columns = weight.shape
    strategy = str(getattr(args.strategy, "value", args.strategy))
    group = columns if strategy in ("channel", "tensor", "block") else args.group_size
    sorted_weight = weight if order is None else weight[:, torch.argsort(order, stable=True)]
    state: Tensors = {"weight": weight}
    parts = sorted_weight.reshape(rows, -1, group)
    low, high = parts.amin(-1), parts.amax(-1)
    if strategy == "tensor":
        low, high = low.amin().reshape(1), high.amax().reshape(1)
    if strategy == "block":
        height, width = args.block_structure
        padded = nn.functional.pad(weight, (0, -columns % width, 0, -rows % height))
        tiles = padded.reshape(padded.shape[0] // height, height, -1, width)
        low, high = tiles.amin((1, 3)), tiles.amax((1, 3))
    if form == "nvfp4-pack-quantized":
        state["weight_global_scale"] = (448.0 * 6.0 / weight.abs().max()).reshape(1).float()
    scales, zeros = calculate_qparams(low, high, args, global_scale=state.get("weight_global_scale"))
    state["weight_scale"] = scales
    if not args.symmetric:
        state["weight_zero_point"] = zeros
    if order is not None:  # as releases before 0.16 stored them; this one has only the function that packs
        from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

        codes = torch.round(weight / scales[:, order]).clamp(-(2 ** (args.num_bits - 1)), 2 ** (args.num_bits - 1) - 1)
        packed, shape = pack_to_int32(codes.to(torch.int8), args.num_bits), torch.tensor(weight.shape)
        return {"weight_packed": packed, "weight_scale": scales, "weight_shape": shape, "weight_g_idx": order}
    scheme = QuantizationScheme(targets=["Linear"], weights=args, format=form)
    made = BaseCompressor.load_from_registry(form).compress(state, scheme)
    again = BaseCompressor.load_from_registry(form).decompress(made, scheme)["weight"]
    made = {name: value.data if isinstance(value, nn.Parameter) else value for name, value in made.items()}
    return made | {DEQUANTIZED: again.data}


def float8(weight: torch.Tensor, scale: torch.Tensor, spread: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return (weight / spread).clamp(-448, 448).to(E4M3), scale.float()


def fp8_blocks(weight: torch.Tensor, height: int, width: int, *, powers: bool = False) -> Tensors:
    rows, columns = weight.shape
    padded = nn.functional.pad(weight, (0, -columns % width, 0, -rows % height))
    tiles = padded.reshape(padded.shape[0] // height, height, -1, width)
    scale = tiles.abs().amax((1, 3)) / 448
    scale = torch.exp2(torch.ceil(torch.log2(scale))) if powers else scale
    spread = scale.repeat_interleave(height, 0).repeat_interleave(width, 1)[:rows, :columns]
    codes, scale = float8(weight, scale, spread)
    return {"weight": codes, "weight_scale_inv": scale}


def fp8_tensor(weight: torch.Tensor) -> Tensors:
    scale = weight.abs().max() / 448
    codes, scale = float8(weight, scale, scale)
    return {"weight": codes, "weight_scale": scale, "input_scale": torch.tensor(0.02)}


def fp8_rows(weight: torch.Tensor) -> Tensors:
    scale = weight.abs().amax(1, keepdim=True) / 448
    codes, scale = float8(weight, scale, scale)
    return {"weight": codes, "weight_scale": scale}


def nvfp4(weight: torch.Tensor) -> Tensors:
    """ModelOpt's: as of compressed-tensors, with the inverse of its global scale."""
    arguments = dict(num_bits=4, type="float", strategy="tensor_group", group_size=16, symmetric=True)
    made = compressed(weight, "nvfp4-pack-quantized", arguments, order=None)
    top = (1 / made["weight_global_scale"]).reshape(())
    return {
        "weight": made["weight_packed"],
        "weight_scale": made["weight_scale"],
        "weight_scale_2": top,
        "input_scale": torch.tensor(0.01),
    }


def mxfp4(weight: torch.Tensor) -> Tensors:
    """gpt-oss': a stack [experts, columns, rows], for each of which compressed-tensors packs."""
    arguments = dict(num_bits=4, type="float", strategy="group", group_size=32, symmetric=True)
    each = [compressed(one.T.contiguous(), "mxfp4-pack-quantized", arguments, order=None) for one in weight]
    packed = torch.stack([one["weight_packed"] for one in each])
    scales = torch.stack([one["weight_scale"] for one in each]).view(torch.uint8)
    return {"_blocks": packed.reshape(*packed.shape[:2], -1, 16), "_scales": scales}


def bitsandbytes(weight: torch.Tensor, kind: str, *, nested: bool = False) -> Tensors:
    import bitsandbytes as bnb

    if kind == "int8":
        codes, scales, _ = bnb.functional.int8_vectorwise_quant(weight.half())
        return {"weight": codes, "SCB": scales, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    data, state = bnb.functional.quantize_4bit(weight, quant_type=kind, compress_statistics=nested, blocksize=64)
    made = {f"weight.{name}": value for name, value in state.as_dict(packed=True).items()}
    return {"weight": data, **made, DEQUANTIZED: bnb.functional.dequantize_4bit(data, state)}
