# SPDX-License-Identifier: Apache-2.0
"""Writes a Hugging Face checkpoint as a GGUF file with the package `gguf`, as llama.cpp's converter does.

The package has the tensors' names and the format; what the converter adds is here: the order of the rows of queries and
keys, the norms of Gemma, experts in one tensor, and which key has which field of the config.
"""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from tests.golden import weights

# model_type -> GGUF architecture
ARCHITECTURES = {
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "granite": "granite",
    "llama": "llama",
    "mistral": "llama",
    "mixtral": "llama",
    "olmo2": "olmo2",
    "phi3": "phi3",
    "qwen2": "qwen2",
    "qwen2_moe": "qwen2moe",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3moe",
    "smollm3": "smollm3",
    "stablelm": "stablelm",
    "starcoder2": "starcoder2",
}
PERMUTED = ("llama", "granite", "smollm3")
SHIFTED = ("gemma", "gemma2", "gemma3")
# The converter merges the experts of a layer under these names.
MERGED = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}

Chooses = Callable[[str, np.ndarray], str]


def plain(name: str, values: np.ndarray) -> str:
    return "F32"


def write(
    file: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    *,
    chooses: Chooses = plain,
    tokenizer: Callable[[Any], None] | None = None,
) -> Path:
    """`config` is as transformers completes it. `chooses` names the type to store a tensor in, by its GGUF name."""
    architecture = ARCHITECTURES[config["model_type"]]
    writer = gguf.GGUFWriter(file, architecture)
    _write_config(writer, architecture, config)
    if tokenizer is not None:
        tokenizer(writer)
    for name, values in _renamed(architecture, config, tensors):
        kind = gguf.GGMLQuantizationType[chooses(name, values)]
        writer.add_tensor(name, np.ascontiguousarray(stored(name, values, kind)), raw_dtype=kind)
    for name, values in _rope_tensors(config).items():
        writer.add_tensor(name, np.asarray(values, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def stored(name: str, values: np.ndarray, kind: Any) -> np.ndarray:
    """The bytes of a tensor. The package has no encoder for K-quants: their blocks are drawn by the tensor's name."""
    if kind.name == "F32":
        return values
    if not kind.name.endswith("_K"):
        return gguf.quants.quantize(values, kind)
    columns, size = gguf.GGML_QUANT_SIZES[kind]
    shape = (*values.shape[:-1], values.shape[-1] // columns, size)
    drawn = ((weights.uniform(1, f"{name} {kind.name}", shape) + 1) * 128).astype(np.uint8)
    for at, scale in SCALES[kind.name].items():
        # Between a half and one and a half times the scale, so that blocks differ.
        factor = 1 + weights.uniform(1, f"{name} {at}", (*shape[:-1], 1)) / 2
        drawn[..., at : at + 2] = (scale * factor).astype("<f2").view(np.uint8)
    return drawn.reshape(*values.shape[:-1], -1)


# Where blocks have numbers of 16 bits, and how large they are in weights of a standard deviation of about 0.06.
SCALES = {
    "Q2_K": {80: 7e-3, 82: 1e-2},
    "Q3_K": {108: 2e-3},
    "Q4_K": {0: 4e-4, 2: 3e-3},
    "Q5_K": {0: 2e-4, 2: 3e-3},
    "Q6_K": {208: 5e-5},
}


def head_dim(config: Mapping[str, Any]) -> int:
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def rope(config: Mapping[str, Any]) -> dict[str, Any]:
    given = config.get("rope_parameters") or {}
    return given.get("full_attention", given)


def _write_config(writer: Any, architecture: str, config: Mapping[str, Any]) -> None:
    heads, size = config["num_attention_heads"], head_dim(config)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads") or heads)
    writer.add_key_length(size)
    writer.add_value_length(size)
    part = rope(config).get("partial_rotary_factor") or 1.0
    writer.add_rope_dimension_count(int(size * part))
    writer.add_rope_freq_base(rope(config).get("rope_theta", 10000.0))
    if "rms_norm_eps" in config:
        writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    else:
        writer.add_layer_norm_eps(config.get("layer_norm_eps") or config["norm_epsilon"])
    _write_scaling(writer, config)
    if config.get("sliding_window") and architecture in ("gemma2", "gemma3", "phi3", "starcoder2", "llama"):
        writer.add_sliding_window(config["sliding_window"])
    if architecture == "gemma2":
        writer.add_attn_logit_softcapping(config["attn_logit_softcapping"])
        writer.add_final_logit_softcapping(config["final_logit_softcapping"])
    if architecture == "gemma3":
        every = next(i + 1 for i, kind in enumerate(config["layer_types"]) if kind == "full_attention")
        writer.add_sliding_window_pattern(every)
        writer.add_float32("gemma3.rope.freq_base_swa", config["rope_parameters"]["sliding_attention"]["rope_theta"])
        if config["final_logit_softcapping"]:
            writer.add_final_logit_softcapping(config["final_logit_softcapping"])
    if architecture == "granite":
        writer.add_attention_scale(config["attention_multiplier"])
        writer.add_embedding_scale(config["embedding_multiplier"])
        writer.add_residual_scale(config["residual_multiplier"])
        writer.add_logit_scale(config["logits_scaling"])
    experts = config.get("num_local_experts") or config.get("num_experts")
    if experts:
        writer.add_expert_count(experts)
        writer.add_expert_used_count(config["num_experts_per_tok"])
    if config.get("moe_intermediate_size"):
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    if config.get("shared_expert_intermediate_size"):
        writer.add_expert_shared_feed_forward_length(config["shared_expert_intermediate_size"])


def _write_scaling(writer: Any, config: Mapping[str, Any]) -> None:
    given = rope(config)
    match given.get("rope_type"):
        case "linear":
            writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(given["factor"])
        case "yarn":
            writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
            writer.add_rope_scaling_factor(given["factor"])
            writer.add_rope_scaling_orig_ctx_len(given["original_max_position_embeddings"])
            if given.get("attention_factor"):
                writer.add_rope_scaling_yarn_attn_factor(given["attention_factor"])
        case "longrope":
            original = given["original_max_position_embeddings"]
            scale = config["max_position_embeddings"] / original
            writer.add_rope_scaling_orig_ctx_len(original)
            factor = math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0
            writer.add_rope_scaling_attn_factors(given.get("attention_factor") or factor)
        case _:
            pass


def _rope_tensors(config: Mapping[str, Any]) -> dict[str, Any]:
    given = rope(config)
    if given.get("rope_type") == "longrope":
        return {
            "rope_factors_long.weight": given["long_factor"],
            "rope_factors_short.weight": given["short_factor"],
        }
    if given.get("rope_type") != "llama3":
        return {}
    waves = 2 * math.pi * given["rope_theta"] ** (np.arange(0, head_dim(config), 2) / head_dim(config))
    original = given["original_max_position_embeddings"]
    low, high = given["low_freq_factor"], given["high_freq_factor"]
    smooth = (original / waves - low) / (high - low)
    between = 1 / ((1 - smooth) / given["factor"] + smooth)
    divisors = np.where(waves < original / high, 1.0, np.where(waves > original / low, given["factor"], between))
    return {"rope_freqs.weight": divisors}


def _renamed(architecture: str, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> Any:
    names = gguf.get_tensor_name_map(
        next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture),
        config["num_hidden_layers"],
    )
    for name, values in _merged(config, tensors).items():
        values = _scaled(architecture, config, name, values)
        if architecture in SHIFTED and name.endswith("norm.weight"):
            values = values + 1
        if architecture in PERMUTED and ".q_proj." in name:
            values = permuted(values, config["num_attention_heads"])
        if architecture in PERMUTED and ".k_proj." in name:
            values = permuted(values, config["num_key_value_heads"])
        if name.endswith("inv_freq"):
            continue
        known = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert known is not None, name
        if known.endswith("ffn_gate_inp_shexp.weight"):
            values = values[0]
        yield known, values


def _scaled(architecture: str, config: Mapping[str, Any], name: str, values: np.ndarray) -> np.ndarray:
    """A file does not say what queries are scaled by: weights make up for another number than the usual one."""
    if architecture not in ("gemma2", "gemma3"):
        return values
    factor = np.float32(math.sqrt(head_dim(config) / config["query_pre_attn_scalar"]))
    if architecture == "gemma2":
        return values * factor if name.endswith("q_proj.weight") else values
    return (values + 1) * factor - 1 if name.endswith("q_norm.weight") else values


def permuted(values: np.ndarray, heads: int) -> np.ndarray:
    return values.reshape(heads, 2, -1, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)


def _merged(config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """With one tensor for all experts of a layer, or for the norms of all heads."""
    found: dict[str, np.ndarray] = {}
    stacks: dict[str, dict[int, np.ndarray]] = {}
    for name, values in tensors.items():
        head, _, rest = name.partition(".experts.") if ".experts." in name else name.partition(".norms.")
        number, _, part = rest.partition(".")
        if not rest:
            found[name] = values
            continue
        if ".experts." in name:
            what, kind = part.split(".")
            merged = f"{head.replace('block_sparse_moe', 'mlp')}.experts.{MERGED.get(what, what)}.{kind}"
        else:
            merged = f"{head}.{part}"
        stacks.setdefault(merged, {})[int(number)] = values
    return found | {name: np.stack([each[i] for i in range(len(each))]) for name, each in stacks.items()}
