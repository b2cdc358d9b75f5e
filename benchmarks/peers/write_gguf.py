# SPDX-License-Identifier: Apache-2.0
"""Writes a Llama's folder as one float32 file for llama.cpp; runs in a Python that has gguf and nothing of jaxserve.

    python write_gguf.py FOLDER FILE

Supports two tokenizers: byte-level BPE, as in the demo, and one token per word (words.py), which becomes a unigram
model whose only pieces are whole words. llama.cpp splits text by its own rules before BPE; for words separated by
spaces they agree with the demo's rule.
"""

import json
import sys
from pathlib import Path
from typing import Any

import gguf  # pyright: ignore[reportMissingImports]
import numpy as np

LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
WHOLE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
SPLIT = "smollm"  # llama.cpp's name for this splitting: single digits, words with the space before them
NORMAL, CONTROL = 1, 3


def tensors(folder: Path) -> dict[str, np.ndarray]:
    """The checkpoint's tensors in float32, by name."""
    found: dict[str, np.ndarray] = {}
    for path in folder.glob("*.safetensors"):
        content = np.memmap(path, np.uint8, "r")
        length = int(content[:8].view("<u8")[0])
        for name, about in json.loads(bytes(content[8 : 8 + length])).items():
            if name == "__metadata__":
                continue
            start, end = (8 + length + offset for offset in about["data_offsets"])
            match about["dtype"]:
                case "F32":
                    values = content[start:end].view("<f4")
                case "BF16":
                    values = (content[start:end].view("<u2").astype("<u4") << 16).view("<f4")
                case other:
                    raise SystemExit(f"error: {name} is {other}; supported are F32 and BF16")
            found[name] = values.reshape(about["shape"])
    return found


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """The rows of a head in llama.cpp's order for RoPE: it rotates neighbours, not halves."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def write_weights(writer: Any, folder: Path, config: dict[str, Any]) -> None:
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    for name, values in tensors(folder).items():
        plain = name.removesuffix(".weight")
        if plain in WHOLE:
            known = WHOLE[plain]
        else:
            _, _, layer, rest = plain.split(".", 3)
            known = f"blk.{layer}.{LAYER[rest]}"
        if known.endswith(("attn_q", "attn_k")):
            values = interleaved(values, heads if known.endswith("q") else kv_heads)
        writer.add_tensor(f"{known}.weight", np.ascontiguousarray(values))


def write_shape(writer: Any, config: dict[str, Any]) -> None:
    size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_rope_dimension_count(size)
    writer.add_rope_freq_base(config.get("rope_parameters", config).get("rope_theta", 10000.0))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])


def _chat_template(folder: Path) -> str:
    """From chat_template.jinja, which newer transformers write, else from the tokenizer configuration."""
    file = folder / "chat_template.jinja"
    if file.exists():
        return file.read_text()
    return json.loads((folder / "tokenizer_config.json").read_text())["chat_template"]


def write_tokenizer(writer: Any, folder: Path, config: dict[str, Any]) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    model, special = tokenizer["model"], {one["id"] for one in tokenizer["added_tokens"]}
    names = {place: name for name, place in model["vocab"].items()}
    names |= {one["id"]: one["content"] for one in tokenizer["added_tokens"]}
    tokens = [names[place] for place in range(config["vocab_size"])]
    if model["type"] == "BPE":
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(SPLIT)
        writer.add_token_merges([one if isinstance(one, str) else " ".join(one) for one in model["merges"]])
    elif model["type"] == "WordLevel":
        writer.add_tokenizer_model("t5")
        writer.add_tokenizer_pre("default")
        writer.add_unk_token_id(model["vocab"][model["unk_token"]])
        writer.add_add_space_prefix(True)
        tokens = [name if place in special else f"\u2581{name}" for place, name in enumerate(tokens)]
        writer.add_token_scores([-1.0] * len(tokens))
    else:
        raise SystemExit(f"error: the tokenizer's type is {model['type']}; supported are BPE and WordLevel")
    writer.add_token_list(tokens)
    writer.add_token_types([CONTROL if place in special else NORMAL for place in range(len(tokens))])
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_add_bos_token(False)  # the chat template adds it
    writer.add_add_eos_token(False)
    writer.add_chat_template(_chat_template(folder))


def main() -> None:
    folder, file = Path(sys.argv[1]), Path(sys.argv[2])
    config = json.loads((folder / "config.json").read_text())
    if config["architectures"] != ["LlamaForCausalLM"]:
        raise SystemExit(f"error: the model is a {config['architectures'][0]}; supported is LlamaForCausalLM")
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    write_shape(writer, config)
    write_tokenizer(writer, folder, config)
    write_weights(writer, folder, config)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main()
