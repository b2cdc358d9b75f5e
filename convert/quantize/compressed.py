# SPDX-License-Identifier: Apache-2.0
"""Rounded weights as compressed-tensors' checkpoints have them, and their quantization_config.

rounding         format            tensors
groups           pack-quantized    weight_packed int32 [rows, columns / 8]; weight_scale bfloat16 [rows, groups];
                                   weight_zero_point int32 [rows / 8, groups]; weight_shape
rows             int-quantized     weight int8; weight_scale float32 [rows, 1]; activations int8, if they are rounded
                 pack-quantized    weight_packed int32 [rows, columns / 4]; weight_scale; weight_shape; if they are not
float8_tensor    float-quantized   weight float8; weight_scale float32 [1]; activations float8, as for all of these
float8_rows      float-quantized   weight_scale float32 [rows, 1]
float8_blocks    float-quantized   weight_scale float32 [rows / 128, columns / 128], rounded up
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from convert.files.shards import Planned
from jaxserve.quant.rounding import BLOCK
from jaxserve.quant.scheme import Rounding, Scheme
from jaxserve.quant.schemes import CODES, SCALES, ZEROS

type Array = np.ndarray[Any, Any]
type Form = Literal["pack-quantized", "int-quantized", "float-quantized"]


@dataclass(frozen=True)
class Rounded:
    """How a matrix is stored."""

    scheme: Scheme
    rounding: Rounding
    activations: bool  # whether other programs are to round activations too

    @property
    def form(self) -> Form:
        if self.scheme.kind == "float8":
            return "float-quantized"
        return "int-quantized" if self.activations else "pack-quantized"

    @property
    def bits(self) -> int:
        return 4 if self.rounding == "groups" else 8

    @property
    def group(self) -> int | None:
        return self.scheme.components[1].columns


# --- tensors ----------------------------------------------------------------------------------------------------------


def planned(name: str, shape: tuple[int, ...], how: Rounded) -> list[Planned]:
    """The tensors in place of a matrix with this name."""
    module, (rows, columns) = name.removesuffix(".weight"), shape
    scales: tuple[int, ...] = (rows, 1)
    if how.rounding == "float8_tensor":
        scales = (1,)
    elif how.rounding == "float8_blocks":
        scales = (-(-rows // BLOCK), -(-columns // BLOCK))
    elif how.group is not None:
        scales = (rows, columns // how.group)
    found = [Planned(f"{module}.weight_scale", "BF16" if how.rounding == "groups" else "F32", scales)]
    if how.form != "pack-quantized":
        dtype = "F8_E4M3" if how.form == "float-quantized" else "I8"
        return [Planned(f"{module}.weight", dtype, shape), *found]
    words = -(-columns * how.bits // 32)
    found += [Planned(f"{module}.weight_packed", "I32", (rows, words)), Planned(f"{module}.weight_shape", "I64", (2,))]
    if how.rounding == "groups":
        found.append(Planned(f"{module}.weight_zero_point", "I32", (-(-rows // 8), scales[-1])))
    return found


def tensors(name: str, components: Mapping[str, Array], how: Rounded) -> dict[str, Array]:
    """Their values."""
    module, codes = name.removesuffix(".weight"), components[CODES]
    found = {f"{module}.weight_scale": _scales(components[SCALES], how)}
    if how.form != "pack-quantized":
        return found | {f"{module}.weight": codes}
    columns = codes.shape[1] * (2 if how.bits == 4 else 1)
    if how.bits == 8:  # signed, with their middle as zero
        codes = np.pad(codes.view(np.uint8) ^ np.uint8(128), ((0, 0), (0, -columns % 4)))
    found[f"{module}.weight_packed"] = np.ascontiguousarray(codes).view(np.int32)
    found[f"{module}.weight_shape"] = np.array([len(codes), columns], np.int64)
    if how.rounding == "groups":
        found[f"{module}.weight_zero_point"] = _along_rows(components[ZEROS])
    return found


def _scales(scales: Array, how: Rounded) -> Array:
    match how.rounding:
        case "float8_tensor":
            return scales[:1]
        case "float8_blocks":
            assert how.group is not None
            return scales[::BLOCK, :: BLOCK // how.group]
        case "groups":
            return scales
        case _:
            return scales[:, None]


def _along_rows(zeros: Array) -> Array:
    """Numbers of 4 bits [rows, groups] in int32 words [rows / 8, groups], the first row in the lowest bits."""
    padded = np.pad(zeros, ((0, -len(zeros) % 8), (0, 0))).astype(np.uint32).reshape(-1, 8, zeros.shape[1])
    found = np.zeros((len(padded), zeros.shape[1]), np.uint32)
    for place in range(8):
        found |= padded[:, place] << np.uint32(4 * place)
    return found.view(np.int32)


# --- the config -------------------------------------------------------------------------------------------------------


def config(chosen: Mapping[str, Rounded], ignored: Iterable[str]) -> dict[str, Any]:
    """The quantization_config of a checkpoint with these weights, by name. `ignored`: modules that stay plain."""
    modules: dict[Rounded, list[str]] = {}
    for name, how in chosen.items():
        modules.setdefault(how, []).append(name.removesuffix(".weight"))
    one = len(modules) == 1
    groups = {
        f"group_{i}": _group(how, ["Linear"] if one else _patterns(those))
        for i, (how, those) in enumerate(modules.items())
    }
    forms = {how.form for how in modules}
    return {
        "quant_method": "compressed-tensors",
        "format": forms.pop() if len(forms) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": sorted(ignored),
        "kv_cache_scheme": None,
    }


def _group(how: Rounded, targets: list[str]) -> dict[str, Any]:
    strategies = {"groups": "group", "float8_tensor": "tensor", "float8_blocks": "block"}
    strategy = strategies.get(how.rounding, "channel")
    kind = "float" if how.form == "float-quantized" else "int"
    weights: dict[str, Any] = {
        "num_bits": how.bits,
        "type": kind,
        "symmetric": how.rounding != "groups",
        "strategy": strategy,
        "group_size": how.group if strategy == "group" else None,
        "block_structure": [BLOCK, BLOCK] if strategy == "block" else None,
        "dynamic": False,
    }
    activations: dict[str, Any] | None = None
    if how.activations:
        block = strategy == "block"
        activations = {"num_bits": 8, "type": kind, "symmetric": True, "dynamic": True}
        activations |= {"strategy": "group" if block else "token", "group_size": BLOCK if block else None}
    return {
        "targets": targets,
        "weights": weights,
        "input_activations": activations,
        "output_activations": None,
        "format": how.form,
    }


def _patterns(modules: Iterable[str]) -> list[str]:
    """Patterns of these names, in which any number stands for any other."""
    return sorted({"re:" + re.sub(r"(?<=\\\.)\d+(?=\\\.)", r"\\d+", re.escape(each)) + "$" for each in modules})
