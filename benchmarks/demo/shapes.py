# SPDX-License-Identifier: Apache-2.0
"""The configurations of the two demo models, and writing the models as Hugging Face folders."""

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save
from tokenizers import Tokenizer

from benchmarks.demo import vocabulary
from jaxserve.models import param_layout
from jaxserve.models.decoder import Params
from jaxserve.models.families.llama import WEIGHTS

LENGTH = 2048  # tokens of prompt and answer together, at most
GENERATION = {"do_sample": True, "temperature": 0.7, "top_p": 0.95}


def config(tokenizer: Tokenizer, *, draft: bool) -> dict[str, Any]:
    """The content of config.json: a Llama."""
    if draft:
        size = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 2}
    else:
        size = {"hidden_size": 192, "intermediate_size": 480, "num_hidden_layers": 4, "num_attention_heads": 4}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": tokenizer.get_vocab_size(),
        **size,
        "num_key_value_heads": size["num_attention_heads"] // 2,
        "head_dim": 32,
        "hidden_act": "silu",
        "max_position_embeddings": LENGTH,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        **_special(tokenizer),
        "dtype": "bfloat16",
    }


def _special(tokenizer: Tokenizer) -> dict[str, Any]:
    names = {"bos": vocabulary.BEGIN, "eos": vocabulary.END, "pad": vocabulary.PAD}
    return {f"{name}_token_id": tokenizer.token_to_id(text) for name, text in names.items()}


def write(folder: Path, tokenizer: Tokenizer, public: Params, *, draft: bool) -> None:
    """Writes a Hugging Face folder with the weights rounded to bfloat16."""
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / "config.json", config(tokenizer, draft=draft))
    _write_json(folder / "generation_config.json", {**_special(tokenizer), **GENERATION})
    vocabulary.save(tokenizer, folder, LENGTH)
    tensors: dict[str, np.ndarray[Any, Any]] = {}
    names = {rule.path: rule.source for rule in WEIGHTS}
    for path, array in param_layout.leaves(public):
        layer = path[1] if path[0] == "layers" else ""
        rule = names[param_layout.dotted(("layers", "{layer}", *path[2:]) if path[0] == "layers" else path)]
        values = np.asarray(array, np.float32).astype(ml_dtypes.bfloat16)
        # Here the heads are a separate axis; in the file they are rows or columns of one matrix.
        heads = path[-2] in ("q", "k", "v"), path[-2] == "out"
        shape = (-1, values.shape[-1]) if heads[0] else (values.shape[0], -1) if heads[1] else values.shape
        tensors[rule.format(layer=layer)] = values.reshape(shape)
    made = folder / "model.safetensors.part"
    made.write_bytes(save(tensors, metadata={"format": "pt"}))
    made.replace(folder / "model.safetensors")


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
