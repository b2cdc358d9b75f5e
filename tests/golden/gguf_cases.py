# SPDX-License-Identifier: Apache-2.0
"""Golden GGUF files: small ones with every block format, made from a seed, and what transformers computes with them.

As with checkpoints, only the logits are stored: data/gguf. `python -m tests.golden.make_gguf` records them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tests.golden import as_gguf, load, weights

DATA = load.DATA / "gguf"
SEED = 3
PROMPT = tuple(int(each) for each in (weights.uniform(SEED, "prompt", (40,)) + 1) * 48)


@dataclass(frozen=True)
class GgufCase:
    config: Mapping[str, Any]
    kinds: Mapping[str, str]  # the format of tensors with this in their name; F32 for the others
    biases: tuple[str, ...] = ()
    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")


SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}
LLAMA = {**SIZES, "model_type": "llama"}
K_QUANTS = {"attn_q": "Q2_K", "attn_k": "Q4_K", "attn_v": "Q6_K", "attn_output": "Q3_K"}
CASES = {
    "llama-k-quants": GgufCase(
        LLAMA, {**K_QUANTS, "ffn_gate": "Q4_K", "ffn_up": "Q5_K", "ffn_down": "Q6_K", "token_embd": "Q6_K"}
    ),
    "llama-legacy": GgufCase(
        LLAMA,
        {
            **{"attn_q": "Q4_0", "attn_k": "Q4_1", "attn_v": "Q5_0", "attn_output": "Q5_1"},
            **{"ffn_gate": "Q8_0", "ffn_up": "F16", "ffn_down": "BF16", "token_embd": "Q8_0"},
        },
    ),
    "qwen2": GgufCase(
        {**SIZES, "model_type": "qwen2"},
        {"attn_q.weight": "Q4_K", "attn_k.weight": "Q4_K", "attn_v.weight": "Q5_K", "ffn": "Q4_0", "token_embd": "F16"},
        biases=("q_proj", "k_proj", "v_proj"),
    ),
    "qwen3": GgufCase(
        # Heads of 128: transformers does not read this size of a Qwen 3 from the file.
        {**SIZES, "model_type": "qwen3", "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 128},
        {"attn_output": "Q4_K", "ffn_gate": "Q5_0", "ffn_up": "Q5_0", "ffn_down": "Q8_0"},
        norms=("input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm"),
    ),
}


def tensors_of(case: GgufCase) -> dict[str, np.ndarray]:
    """By the names of a Hugging Face checkpoint; the head is tied to the embeddings."""
    config = case.config
    hidden, width, size = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    q, kv = config["num_attention_heads"] * size, config["num_key_value_heads"] * size
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}
    shapes["model.norm.weight"] = (hidden,)
    matrices = {"q_proj": (q, hidden), "k_proj": (kv, hidden), "v_proj": (kv, hidden), "o_proj": (hidden, q)}
    mlp = {"gate_proj": (width, hidden), "up_proj": (width, hidden), "down_proj": (hidden, width)}
    for layer in range(config["num_hidden_layers"]):
        start = f"model.layers.{layer}"
        shapes |= {f"{start}.self_attn.{name}.weight": shape for name, shape in matrices.items()}
        shapes |= {f"{start}.self_attn.{name}.bias": matrices[name][:1] for name in case.biases}
        shapes |= {f"{start}.mlp.{name}.weight": shape for name, shape in mlp.items()}
        shapes |= {f"{start}.{name}.weight": (size if "self_attn" in name else hidden,) for name in case.norms}
    rules = weights.Rules(gains={"embed_tokens": 0.25})
    return {name: weights.tensor(SEED, name, shape, rules) for name, shape in shapes.items()}


def write(name: str, file: Path) -> Path:
    case = CASES[name]

    def chooses(tensor: str, values: np.ndarray) -> str:
        plain = values.ndim < 2
        return next((kind for part, kind in case.kinds.items() if part in tensor and not plain), "F32")

    return as_gguf.write(file, case.config, tensors_of(case), chooses=chooses, tokenizer=_words)


def _words(writer: Any) -> None:
    """transformers reads the vocabulary's size from the tokenizer."""
    writer.add_vocab_size(96)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"t{i}" for i in range(96)])


def logits(name: str) -> np.ndarray:
    with np.load(DATA / f"{name}.npz") as arrays:
        return arrays["logits"]
