# SPDX-License-Identifier: Apache-2.0
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
"""Writes tiny quantized checkpoints, and what transformers computes with their dequantized weights, to
tests/golden/data/quantized. `make golden-quantized` runs it, in a venv with torch and the packers.

The weights are dequantized by tests/quant/unpackers.py. Where transformers can run the checkpoint itself on a CPU and
quantizes no activations, it must agree.
"""

import json
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from tests.golden import load, packers
from tests.quant import unpackers

DATA = load.DATA / "quantized"
VOCAB = 16
PROMPT = [3, 7, 5, 14, 11, 2, 13, 8]
SAME = 1e-4  # of the logits' spread: what transformers' own quantized model may differ by

LLAMA: dict[str, Any] = dict(
    architectures=["LlamaForCausalLM"],
    model_type="llama",
    hidden_size=64,
    intermediate_size=64,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    vocab_size=VOCAB,
    rms_norm_eps=1e-5,
    tie_word_embeddings=False,
    max_position_embeddings=128,
)
PHI3 = {**LLAMA, "architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "pad_token_id": 0}

Packer = Callable[[str, torch.Tensor], packers.Tensors]


@dataclass(frozen=True)
class Case:
    settings: Mapping[str, Any]
    pack: Packer
    base: Mapping[str, Any] | str = field(default_factory=lambda: LLAMA)
    plain: tuple[str, ...] = ("lm_head", "embed", "norm", "mlp.gate.", "block_sparse_moe.gate.", "router")
    file: str = "config.json"
    itself: bool = False  # transformers computes it on a CPU, with the same activations


def _ct(form: str, *, targets: str = "Linear", activations: Any = None, **arguments: Any) -> dict[str, Any]:
    group = {"targets": [targets], "weights": arguments, "input_activations": activations, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "config_groups": {"group_0": group},
    }


def _compressed(form: str, *, activations: Any = None, ordered: bool = False, **arguments: Any) -> Case:
    def pack(name: str, weight: torch.Tensor) -> packers.Tensors:
        order = _order(name, weight.shape[1], arguments["group_size"]) if ordered else None
        made = packers.compressed(weight, form, arguments, order=order)
        if activations and not activations["dynamic"]:
            made["input_scale"] = torch.tensor([0.02])
        return made

    settings = _ct(form, activations=activations, **arguments | ({"actorder": "group"} if ordered else {}))
    # transformers rounds activations of W8A8, and fails at zero points, floats of 4 bits and g_idx.
    packed = form == "pack-quantized" and arguments["symmetric"] and not ordered
    return Case(settings, pack, itself=packed)


def _mixed() -> Case:
    four: dict[str, Any] = dict(num_bits=4, type="int", strategy="group", group_size=16, symmetric=True)
    eight: dict[str, Any] = dict(num_bits=8, type="int", strategy="channel", symmetric=True)
    settings = _ct("pack-quantized", targets="re:.*mlp.*", **eight)
    other = _ct("pack-quantized", **four)["config_groups"]["group_0"]
    settings["config_groups"]["group_1"] = other
    settings["ignore"] = ["lm_head", "re:.*o_proj"]

    def pack(name: str, weight: torch.Tensor) -> packers.Tensors:
        return packers.compressed(weight, "pack-quantized", eight if "mlp" in name else four, order=None)

    return Case(settings, pack, plain=("lm_head", "embed", "norm", "o_proj"), itself=True)


def _order(name: str, columns: int, group: int) -> torch.Tensor:
    """A group for each column, the same for layers that read the same."""
    seed = (
        1
        if any(each in name for each in ("q_proj", "k_proj", "v_proj"))
        else 2
        if "gate" in name or "up" in name
        else 3
    )
    random = np.random.default_rng(seed)
    return torch.from_numpy(random.permutation(columns).astype(np.int32) // group)


def _gptq(bits: int, group: int, *, version: int = 1, sym: bool = True, ordered: bool = False, **more: Any) -> Case:
    def pack(name: str, weight: torch.Tensor) -> packers.Tensors:
        order = _order(name, weight.shape[1], group) if ordered else None
        width = 8 if more and "down_proj" in name else bits
        return packers.gptq(weight, width, group, sym=sym, order=order, version=version)

    settings = dict(quant_method="gptq", bits=bits, group_size=group, sym=sym, desc_act=ordered, lm_head=False, **more)
    settings["checkpoint_format"] = "gptq" if version == 1 else "gptq_v2"
    skipped = ("v_proj", "k_proj", "q_proj") if more else ()
    return Case(settings, pack, plain=("lm_head", "embed", "norm", *skipped))


def _awq(group: int, *, zeros: bool = True, base: Any = LLAMA, **more: Any) -> Case:
    settings = dict(quant_method="awq", bits=4, group_size=group, zero_point=zeros, version="gemm", **more)
    return Case(settings, lambda _, weight: packers.awq(weight, group, zeros=zeros), base=base)


def _bnb(kind: str, *, nested: bool = False) -> Case:
    four = dict(load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=nested)
    settings = dict(
        quant_method="bitsandbytes",
        llm_int8_threshold=0.0,
        bnb_4bit_compute_dtype="float32",
        **(dict(load_in_8bit=True) if kind == "int8" else four),
    )
    pack = lambda _, weight: packers.bitsandbytes(weight, kind, nested=nested)  # noqa: E731
    return Case(settings, pack)


INT8: dict[str, Any] = dict(num_bits=8, type="int", strategy="channel", symmetric=True)
DYNAMIC = dict(num_bits=8, type="int", strategy="token", symmetric=True, dynamic=True)
FLOAT8: dict[str, Any] = dict(num_bits=8, type="float", symmetric=True)
STATIC8 = dict(num_bits=8, type="float", strategy="tensor", symmetric=True, dynamic=False)
CASES: dict[str, Case] = {
    "awq-32": _awq(32),
    "awq-64": _awq(64),
    "awq-rows": _awq(-1),
    "awq-symmetric": _awq(32, zeros=False),
    "awq-fused": _awq(32, base=PHI3),
    "gptq-4": _gptq(4, 32),
    "gptq-4-v2": _gptq(4, 32, version=2),
    "gptq-4-asymmetric": _gptq(4, 32, sym=False),
    "gptq-4-asymmetric-v2": _gptq(4, 16, sym=False, version=2),
    "gptq-4-ordered": _gptq(4, 32, sym=False, ordered=True),
    "gptq-2": _gptq(2, 16, sym=False),
    "gptq-3": _gptq(3, 32, sym=False),
    "gptq-3-symmetric": _gptq(3, 32),
    "gptq-8": _gptq(8, -1),
    "gptq-dynamic": _gptq(4, 32, dynamic={r"-:.*\.(q|k|v)_proj": {}, r"+:.*\.down_proj": {"bits": 8}}),
    "ct-w4a16": _compressed("pack-quantized", num_bits=4, type="int", strategy="group", group_size=32, symmetric=True),
    "ct-w4a16-asymmetric": _compressed(
        "pack-quantized", num_bits=4, type="int", strategy="group", group_size=32, symmetric=False
    ),
    "ct-w4a16-ordered": _compressed(
        "pack-quantized", ordered=True, num_bits=4, type="int", strategy="group", group_size=32, symmetric=True
    ),
    "ct-w8a16": _compressed("pack-quantized", **INT8),
    "ct-w3a16": _compressed("pack-quantized", num_bits=3, type="int", strategy="group", group_size=32, symmetric=True),
    "ct-w5a16": _compressed("pack-quantized", num_bits=5, type="int", strategy="channel", symmetric=True),
    "ct-w6a16": _compressed("pack-quantized", num_bits=6, type="int", strategy="group", group_size=16, symmetric=False),
    "ct-mixed": _mixed(),
    "ct-w8a8": _compressed("int-quantized", activations=DYNAMIC, **INT8),
    "ct-fp8-static": _compressed("float-quantized", activations=STATIC8, strategy="tensor", **FLOAT8),
    "ct-fp8-dynamic": _compressed(
        "float-quantized", activations={**STATIC8, "strategy": "token", "dynamic": True}, strategy="channel", **FLOAT8
    ),
    "ct-fp8-block": _compressed(
        "float-quantized",
        activations={**STATIC8, "strategy": "group", "group_size": 32, "dynamic": True},
        **{"strategy": "block", "block_structure": [32, 32], **FLOAT8},
    ),
    "ct-nvfp4": _compressed(
        "nvfp4-pack-quantized", num_bits=4, type="float", strategy="tensor_group", group_size=16, symmetric=True
    ),
    "ct-mxfp4": _compressed(
        "mxfp4-pack-quantized", num_bits=4, type="float", strategy="group", group_size=32, symmetric=True
    ),
    "ct-moe": Case(
        _ct("pack-quantized", num_bits=4, type="int", strategy="group", group_size=32, symmetric=True),
        lambda _, weight: packers.compressed(
            weight,
            "pack-quantized",
            dict(num_bits=4, type="int", strategy="group", group_size=32, symmetric=True),
            order=None,
        ),
        base="mixtral",
    ),
    "fp8-block": Case(
        dict(quant_method="fp8", activation_scheme="dynamic", fmt="e4m3", weight_block_size=[32, 16]),
        lambda _, weight: packers.fp8_blocks(weight, 32, 16),
    ),
    "fp8-tensor": Case(
        dict(quant_method="fp8", activation_scheme="static"), lambda _, weight: packers.fp8_tensor(weight)
    ),
    "fp8-deepseek": Case(
        dict(quant_method="fp8", activation_scheme="dynamic", weight_block_size=[32, 32], scale_fmt="ue8m0"),
        lambda _, weight: packers.fp8_blocks(weight, 32, 32, powers=True),
        base="deepseek-v3",
    ),
    "fbgemm": Case(
        dict(quant_method="fbgemm_fp8", activation_scale_ub=1200.0, modules_to_not_convert=["lm_head"]),
        lambda _, weight: packers.fp8_rows(weight),
    ),
    "modelopt-fp8": Case(
        dict(quantization=dict(quant_algo="FP8", kv_cache_quant_algo="FP8", exclude_modules=["lm_head"])),
        lambda name, weight: packers.fp8_tensor(weight) | _kv_scales(name),
        file="hf_quant_config.json",
    ),
    "modelopt-nvfp4": Case(
        dict(quant_method="modelopt", quant_algo="NVFP4", group_size=16, ignore=["lm_head"]),
        lambda _, weight: packers.nvfp4(weight),
    ),
    "gpt-oss-mxfp4": Case(
        dict(quant_method="mxfp4", modules_to_not_convert=["model.layers.*.self_attn", "lm_head"]),
        lambda _, weight: packers.mxfp4(weight),
        base="gpt-oss-hub",
        plain=("lm_head", "embed", "norm", "router", "self_attn"),
        itself=True,
    ),
    "bnb-nf4": _bnb("nf4"),
    "bnb-nf4-nested": _bnb("nf4", nested=True),
    "bnb-fp4": _bnb("fp4"),
    "bnb-int8": _bnb("int8"),
}


def _kv_scales(name: str) -> packers.Tensors:
    part = next((each for each in ("k", "v") if name.endswith(f"{each}_proj")), None)
    return {f"{part}_scale": torch.tensor(1.0)} if part else {}


def content(case: Case) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The config and the weights in float32, fit for float16."""
    if isinstance(case.base, str):
        return _of_golden(load.read(case.base))
    config = dict(case.base)
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "config.json").write_text(json.dumps(config))
        model = AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(name), dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    tensors: dict[str, torch.Tensor] = {}
    for key, value in model.state_dict().items():
        random = torch.randn(value.shape, generator=generator)
        tensors[key] = (1 + 0.1 * random if value.ndim == 1 else random / value.shape[-1] ** 0.5).half().float()
    return config, tensors


EXPERTS = 4
_COUNTS = ("num_local_experts", "n_routed_experts")


def _of_golden(golden: load.Golden) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The first layers, experts and tokens of a golden case."""
    count = 2 if "first_k_dense_replace" in golden.config else 1
    smaller = {name: EXPERTS for name in _COUNTS if name in golden.config}
    config = {**golden.config, **smaller, "num_hidden_layers": count, "vocab_size": VOCAB}
    if "n_group" in config:
        config |= dict(n_group=2, topk_group=2, num_experts_per_tok=2)
    config.pop("num_nextn_predict_layers", None)
    if "layer_types" in config:
        config["layer_types"] = config["layer_types"][:count]
    tensors: dict[str, torch.Tensor] = {}
    for name in golden.tensors:
        numbers = [int(part) for part in re.findall(r"\.(\d+)\.", name)]
        if numbers and (numbers[0] >= count or max(numbers[1:], default=0) >= EXPERTS):
            continue
        value = golden.tensor(name)
        if "embed_tokens" in name or "lm_head" in name:
            value = value[:VOCAB]
        elif smaller and (".router." in name or ".gate.weight" in name or "correction" in name or ".experts." in name):
            value = value[:EXPERTS] if len(value) > EXPERTS and len(numbers) < 2 else value
        tensors[name] = torch.from_numpy(value).half().float()
    return config, tensors


def make(name: str, case: Case, folder: Path) -> str:
    config, weights = content(case)
    folder.mkdir(parents=True)
    tensors: dict[str, torch.Tensor] = {}
    theirs: dict[str, torch.Tensor] = {}
    for key, value in weights.items():
        layer = key.removesuffix(".weight")
        experts = value.ndim == 3
        if value.ndim < 2 or (layer == key and not experts) or any(part in key for part in case.plain):
            tensors[key] = value.half()
            continue
        for suffix, part in case.pack(layer, value).items():
            if suffix == packers.DEQUANTIZED:
                theirs[layer + ".weight"] = part
            else:
                tensors[layer + ("" if suffix.startswith("_") else ".") + suffix] = part
    if isinstance(case.base, str):
        tensors = {
            key: value.to(torch.bfloat16) if value.dtype == torch.float16 else value for key, value in tensors.items()
        }
    if case.file == "config.json":
        config["quantization_config"] = dict(case.settings)
    else:
        (folder / case.file).write_text(json.dumps(case.settings, indent=1))
    (folder / "config.json").write_text(json.dumps(config))
    save_file({key: value.contiguous() for key, value in tensors.items()}, folder / "model.safetensors")
    _check_values(folder, theirs)
    wanted = _logits_of_plain(folder, config)
    np.save(folder / "logits.npy", wanted)
    error = f"{_error_itself(folder, wanted):.1e}" if case.itself else "-"
    size = sum(file.stat().st_size for file in folder.iterdir())
    return f"{name:24}{size:8,} bytes  spread {wanted.std():.2f}  transformers itself {error}"


def _check_values(folder: Path, theirs: Mapping[str, torch.Tensor]) -> None:
    """Check that the packers' own code dequantizes to the same values, except for rounding."""
    ours = unpackers.plain(folder)
    for name, value in theirs.items():
        error = np.abs(ours[name] - value.double().numpy()).max() / np.abs(ours[name]).max()
        if error > (1e-6 if value.dtype == torch.float32 else 4e-3):
            raise RuntimeError(f"{name} is dequantized by its packer as other values: {error:.1e}")


def _logits_of_plain(folder: Path, config: Mapping[str, Any]) -> np.ndarray:
    plain = {key: value.astype(np.float32) for key, value in unpackers.plain(folder).items()}
    kept = {key: value for key, value in plain.items() if not key.endswith(("_scale", "weight_format"))}
    bare = {key: value for key, value in config.items() if key != "quantization_config"}
    with tempfile.TemporaryDirectory() as name:
        load.write_folder(name, bare, kept, "float32", 1)
        model, found = AutoModelForCausalLM.from_pretrained(
            name, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
        )
    if found["missing_keys"] or found["unexpected_keys"] or found["mismatched_keys"]:
        raise RuntimeError(f"the dequantized weights do not fit: {found}")
    return _run(model)


def _error_itself(folder: Path, wanted: np.ndarray) -> float:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    error = float(np.abs(_run(model) - wanted).max() / wanted.std())
    if error > SAME:
        raise RuntimeError(f"transformers' quantized model differs by {error:.1e} of the spread")
    return error


def _run(model: Any) -> np.ndarray:
    return model.eval()(input_ids=torch.tensor([PROMPT]), use_cache=False).logits[0].float().numpy()


def main() -> int:
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    failed: list[str] = []
    for name, case in CASES.items():
        if sys.argv[1:] and not any(each in name for each in sys.argv[1:]):
            continue
        with tempfile.TemporaryDirectory() as place:
            try:
                print(make(name, case, Path(place) / name), flush=True)
            except Exception as error:
                failed.append(name)
                print(f"{name:24}{type(error).__name__}: {error}"[:500], flush=True)
                continue
            shutil.rmtree(DATA / name, ignore_errors=True)
            shutil.copytree(Path(place) / name, DATA / name)
    if failed:
        print("failed:", *failed)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
