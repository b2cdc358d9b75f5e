# SPDX-License-Identifier: Apache-2.0
"""Writes the tokenizer of a model folder into a GGUF file, as llama.cpp's converter does."""

import json
from pathlib import Path
from typing import Any

NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6


def pairs_of(folder: Path, *, pre: str = "llama-bpe", template: str = "") -> dict[str, Any]:
    """The key-value pairs of the tokenizer."""
    content = json.loads((folder / "tokenizer.json").read_text())
    config = json.loads((folder / "tokenizer_config.json").read_text())
    model = content["model"]
    ids = model["vocab"] | {each["content"]: each["id"] for each in content["added_tokens"]}
    tokens = sorted(ids, key=lambda text: ids[text])
    special = {each["content"] for each in content["added_tokens"]}
    bytes_too = model["byte_fallback"]
    pairs: dict[str, Any] = {
        "tokenizer.ggml.model": "llama" if bytes_too else "gpt2",
        "tokenizer.ggml.pre": "default" if bytes_too else pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [_type(text, special) for text in tokens],
        "tokenizer.ggml.bos_token_id": ids[config["bos_token"]],
        "tokenizer.ggml.eos_token_id": ids[config["eos_token"]],
    }
    if bytes_too:
        # SentencePiece ranks tokens in the order of their training.
        pairs["tokenizer.ggml.scores"] = [-float(max(ids[text] - 258, 0)) for text in tokens]
        pairs["tokenizer.ggml.unknown_token_id"] = ids["<unk>"]
    else:
        pairs["tokenizer.ggml.merges"] = [" ".join(each) for each in model["merges"]]
    return pairs | ({"tokenizer.chat_template": template} if template else {})


def _type(text: str, special: set[str]) -> int:
    if text == "<unk>":
        return UNKNOWN
    if text in special:
        return CONTROL
    return BYTE if len(text) == 6 and text.startswith("<0x") else NORMAL
