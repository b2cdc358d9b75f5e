# SPDX-License-Identifier: Apache-2.0
"""A tokenizer with one token per word for models with random weights, so that text prompts have a known length."""

import json
from pathlib import Path

from jaxserve.cli.bench_serve import WORDS

SPECIAL = ("<unk>", "<s>", "</s>")
# Adds no words around a message, so that all servers agree on the prompt of a chat.
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% if not loop.last %} {% endif %}{% endfor %}"


def vocabulary(size: int) -> list[str]:
    """Common words first, then numbered ones."""
    words = [*SPECIAL, *dict.fromkeys(WORDS.split())]
    return (words + [f"w{place}" for place in range(len(words), size)])[:size]


def write_tokenizer(folder: Path, size: int) -> None:
    """Writes the tokenizer's files into a model's folder."""
    words = vocabulary(size)
    added = [
        {"id": place, "content": word, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        | {"special": True}
        for place, word in enumerate(SPECIAL)
    ]
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": None,
        "decoder": None,
        "model": {
            "type": "WordLevel",
            "vocab": {word: place for place, word in enumerate(words)},
            "unk_token": "<unk>",
        },
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "<unk>",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "clean_up_tokenization_spaces": False,
        "chat_template": TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": 2}))
