# SPDX-License-Identifier: Apache-2.0
"""What a quantized checkpoint's tensors stand for, in float64 and by the formulas of each format alone.

Slow and plain: bits are taken out of integers one value at a time, and nothing of the product is used.
"""

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

Array = np.ndarray[Any, Any]

_DTYPES = {
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu,
    "U8": np.uint8,
    "I8": np.int8,
    "I32": np.int32,
    "I64": np.int64,
}
E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6]


def read(folder: Path) -> dict[str, Array]:
    """The tensors of a folder's only file."""
    data = (folder / "model.safetensors").read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header: dict[str, Any] = json.loads(data[8 : 8 + size])
    found: dict[str, Array] = {}
    for name, entry in header.items():
        if name != "__metadata__":
            start, stop = (8 + size + at for at in entry["data_offsets"])
            found[name] = np.frombuffer(data[start:stop], _DTYPES[entry["dtype"]]).reshape(entry["shape"])
    return found


def write(folder: Path, tensors: Mapping[str, Array]) -> None:
    """The reverse of `read`."""
    names, header, end = {np.dtype(dtype): name for name, dtype in _DTYPES.items()}, {}, 0
    for name, array in tensors.items():
        offsets = [end, end := end + array.nbytes]
        header[name] = {"dtype": names[array.dtype], "shape": list(array.shape), "data_offsets": offsets}
    text = json.dumps(header).encode()
    data = b"".join(array.tobytes() for array in tensors.values())
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)


def plain(folder: Path) -> dict[str, Array]:
    """All weights of a folder in float64, under the names that plain checkpoints have for them."""
    tensors, settings = read(folder), settings_of(folder)
    unpack = METHODS[settings["quant_method"]]
    found = unpack(tensors, settings)
    layers = tuple({_layer(name) for name in found})
    used = {name for name in tensors if name.startswith(layers) or name.endswith(("_blocks", "_scales"))}
    rest = {name: array.astype(np.float64) for name, array in tensors.items() if name not in used}
    return rest | {name: tensors[name].astype(np.float64) for name in used if name.endswith(".bias")} | found


def settings_of(folder: Path) -> dict[str, Any]:
    config = json.loads((folder / "config.json").read_text())
    if "quantization_config" in config:
        return config["quantization_config"]
    names = {"quantize_config.json": "gptq", "quant_config.json": "awq", "hf_quant_config.json": "modelopt"}
    [(file, method)] = [(folder / name, method) for name, method in names.items() if (folder / name).exists()]
    return {"quant_method": method, **json.loads(file.read_text())}


def _layer(name: str) -> str:
    return name.removesuffix(".weight") + "."


def stream(words: Array, bits: int, count: int) -> Array:
    """`count` numbers of so many bits, from a row of int32 words, the lowest bits first."""
    whole = int.from_bytes(np.ascontiguousarray(words).tobytes(), "little")
    return np.array([whole >> bits * i & (1 << bits) - 1 for i in range(count)], np.float64)


def rows(words: Array, bits: int, count: int) -> Array:
    return np.stack([stream(row, bits, count) for row in words])


# --- formats ----------------------------------------------------------------------------------------------------------


def awq(tensors: Mapping[str, Array], settings: Mapping[str, Any]) -> dict[str, Array]:
    def unpacked(words: Array) -> Array:
        found = np.zeros((words.shape[0], words.shape[1] * 8))
        for m, c in np.ndindex(words.shape):
            for i, place in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
                found[m, 8 * c + place] = int(words[m, c]) >> 4 * i & 15
        return found

    found: dict[str, Array] = {}
    for layer in _with(tensors, ".qweight"):
        codes = unpacked(tensors[layer + ".qweight"])
        scales = tensors[layer + ".scales"].astype(np.float64)
        group = len(codes) // len(scales)
        zeros = unpacked(tensors[layer + ".qzeros"]) if settings.get("zero_point", True) else np.full(scales.shape, 8)
        found[layer + ".weight"] = ((codes - np.repeat(zeros, group, 0)) * np.repeat(scales, group, 0)).T
    return found


def gptq(tensors: Mapping[str, Array], settings: Mapping[str, Any]) -> dict[str, Array]:
    found: dict[str, Array] = {}
    for layer in _with(tensors, ".qweight"):
        scales, order = tensors[layer + ".scales"].astype(np.float64), tensors[layer + ".g_idx"]
        columns, outs = len(order), scales.shape[1]
        words = tensors[layer + ".qweight"]
        bits = 32 * len(words) // columns
        codes = rows(words.T, bits, columns).T
        zeros = rows(tensors[layer + ".qzeros"], bits, outs)
        zeros += settings.get("checkpoint_format", "gptq") == "gptq"
        found[layer + ".weight"] = ((codes - zeros[order]) * scales[order]).T
    return found


def compressed_tensors(tensors: Mapping[str, Array], settings: Mapping[str, Any]) -> dict[str, Array]:
    found: dict[str, Array] = {}
    for layer in _with(tensors, ".weight_packed"):
        packed, scales = tensors[layer + ".weight_packed"], tensors[layer + ".weight_scale"]
        if packed.dtype == np.uint8:
            top = tensors.get(layer + ".weight_global_scale")
            one = exponents(scales) if top is None else scales.astype(np.float64) / top.astype(np.float64)
            found[layer + ".weight"] = in_groups(nibbles(packed), one)
            continue
        outs, columns = map(int, tensors[layer + ".weight_shape"])
        bits = 32 * packed.shape[1] // columns if columns % 32 == 0 else int(bits_by_name(settings))
        codes = rows(packed, bits, columns) - 2 ** (bits - 1)
        wide, zeros = scales.astype(np.float64), np.zeros(scales.shape)
        if layer + ".weight_zero_point" in tensors:
            zeros = rows(tensors[layer + ".weight_zero_point"].T, bits, outs).T - 2 ** (bits - 1)
        group = columns // wide.shape[1]
        order = tensors.get(layer + ".weight_g_idx", np.arange(columns) // group)
        found[layer + ".weight"] = (codes - zeros[:, order]) * wide[:, order]
    for layer in _with(tensors, ".weight_scale"):
        if layer + ".weight" in tensors:
            found[layer + ".weight"] = of_blocks(tensors[layer + ".weight"], tensors[layer + ".weight_scale"], settings)
    return found


def bits_by_name(settings: Mapping[str, Any]) -> int:
    [group] = settings["config_groups"].values()
    return group["weights"]["num_bits"]


def fp8(tensors: Mapping[str, Array], settings: Mapping[str, Any]) -> dict[str, Array]:
    found: dict[str, Array] = {}
    for suffix in (".weight_scale_inv", ".weight_scale"):
        for layer in _with(tensors, suffix):
            found[layer + ".weight"] = of_blocks(tensors[layer + ".weight"], tensors[layer + suffix], settings)
    return found


def modelopt(tensors: Mapping[str, Array], settings: Mapping[str, Any]) -> dict[str, Array]:
    found: dict[str, Array] = {}
    for layer in _with(tensors, ".weight_scale"):
        weight, scales = tensors[layer + ".weight"], tensors[layer + ".weight_scale"].astype(np.float64)
        if weight.dtype == np.uint8:
            scales = scales * tensors[layer + ".weight_scale_2"].astype(np.float64)
            found[layer + ".weight"] = in_groups(nibbles(weight), scales)
        else:
            found[layer + ".weight"] = weight.astype(np.float64) * scales
    return found


def mxfp4(tensors: Mapping[str, Array], settings: Mapping[str, Any]) -> dict[str, Array]:
    found: dict[str, Array] = {}
    for layer in _with(tensors, "_blocks"):
        blocks = nibbles(tensors[layer + "_blocks"])
        one = blocks * exponents(tensors[layer + "_scales"])[..., None]
        found[layer] = np.swapaxes(one.reshape(*one.shape[:2], -1), 1, 2)
    return found


def bitsandbytes(tensors: Mapping[str, Array], settings: Mapping[str, Any]) -> dict[str, Array]:
    found: dict[str, Array] = {}
    for layer in _with(tensors, ".SCB"):
        scales = tensors[layer + ".SCB"].astype(np.float64) / 127
        found[layer + ".weight"] = tensors[layer + ".weight"].astype(np.float64) * scales[:, None]
    for kind in ("nf4", "fp4"):
        for layer in _with(tensors, f".weight.quant_state.bitsandbytes__{kind}"):
            state = json.loads(tensors[f"{layer}.weight.quant_state.bitsandbytes__{kind}"].tobytes())
            table = tensors[layer + ".weight.quant_map"].astype(np.float64)
            scales = tensors[layer + ".weight.absmax"]
            if layer + ".weight.nested_absmax" in tensors:
                top = tensors[layer + ".weight.nested_absmax"].astype(np.float64)
                second = tensors[layer + ".weight.nested_quant_map"].astype(np.float64)
                at = np.arange(len(scales)) // state["nested_blocksize"]
                scales = second[scales] * top[at] + state["nested_offset"]
            data = tensors[layer + ".weight"].reshape(-1)
            codes = np.stack([data >> 4, data & 15], -1).reshape(-1)
            values = table[codes] * scales.astype(np.float64)[np.arange(len(codes)) // state["blocksize"]]
            found[layer + ".weight"] = values.reshape(state["shape"])
    return found


METHODS = {
    "awq": awq,
    "gptq": gptq,
    "compressed-tensors": compressed_tensors,
    "fp8": fp8,
    "fbgemm_fp8": fp8,
    "modelopt": modelopt,
    "mxfp4": mxfp4,
    "bitsandbytes": bitsandbytes,
}


def _with(tensors: Mapping[str, Array], suffix: str) -> list[str]:
    return [name.removesuffix(suffix) for name in tensors if name.endswith(suffix)]


def nibbles(packed: Array) -> Array:
    """Floats of 4 bits, the first of a byte in its low bits."""
    codes = np.stack([packed & 15, packed >> 4], -1).reshape(*packed.shape[:-1], -1)
    return np.array(E2M1, np.float64)[codes]


def exponents(scales: Array) -> Array:
    return 2.0 ** (scales.view(np.uint8).astype(np.float64) - 127)


def in_groups(values: Array, scales: Array) -> Array:
    return values * np.repeat(scales, values.shape[-1] // scales.shape[-1], axis=-1)


def of_blocks(weight: Array, scales: Array, settings: Mapping[str, Any]) -> Array:
    """One scale for all, for each row, or for each block."""
    values = weight.astype(np.float64)
    wide = exponents(scales) if scales.dtype == np.uint8 else scales.astype(np.float64)
    if wide.size == 1:
        return values * wide.reshape(-1)[0]
    if wide.shape == (len(values), 1):
        return values * wide.reshape(-1, 1)
    if wide.shape[0] == values.shape[0]:
        return in_groups(values, wide)
    if "weight_block_size" in settings:
        height, width = settings["weight_block_size"]
    else:
        [group] = settings["config_groups"].values()
        height, width = group["weights"]["block_structure"]
    found = np.zeros(values.shape)
    for n, k in np.ndindex(values.shape):
        found[n, k] = values[n, k] * wide[n // height, k // width]
    return found
