# SPDX-License-Identifier: Apache-2.0
"""The tokenizer of the demo models: byte-level BPE trained on the generated text, and the chat template."""

import json
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from benchmarks.demo.corpus import Messages, documents

SIZE = 1280
SEED, DOCUMENTS = 0, 30_000  # of the text that the tokenizer is trained on
BEGIN, END, PAD = "<|begin|>", "<|end|>", "<|pad|>"
ROLES = ("system", "user", "assistant")
SPECIAL = (PAD, BEGIN, END, *(f"<|{role}|>" for role in ROLES))
# Words with the space before them, single digits, runs of other characters, line breaks, other spaces.
PIECES = r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s*[\r\n]+|\s+(?!\S)|\s+"
TEMPLATE = (
    "{{- bos_token }}"
    "{%- for message in messages %}"
    "{%- set role = 'system' if message.role == 'developer' else message.role %}"
    "{%- if role not in ['system', 'user', 'assistant'] %}"
    "{{- raise_exception('the demo model knows the roles system, user and assistant') }}"
    "{%- endif %}"
    "{{- '<|' + role + '|>' + (message.content or '') + '<|end|>' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}"
)


def train() -> Tokenizer:
    """Trains the tokenizer; the result is always the same."""
    tokenizer = Tokenizer(models.BPE())
    pieces = pre_tokenizers.Split(Regex(PIECES), behavior="isolated", invert=False)
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pieces, letters])  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=SIZE,
        special_tokens=[AddedToken(text, special=True, normalized=False) for text in SPECIAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(islice(documents(SEED), DOCUMENTS)), trainer)
    begin = tokenizer.token_to_id(BEGIN)
    added = processors.TemplateProcessing(single=f"{BEGIN} $A", pair=f"{BEGIN} $A $B", special_tokens=[(BEGIN, begin)])
    tokenizer.post_processor = added  # pyright: ignore[reportAttributeAccessIssue]
    return tokenizer


def _texts(source: Iterable[Messages | str]) -> Iterator[str]:
    for document in source:
        if isinstance(document, str):
            yield document
        else:
            yield from (message["content"] for message in document)


def save(tokenizer: Tokenizer, folder: Path, length: int) -> None:
    """Writes the tokenizer's files of a Hugging Face folder, for a model of at most `length` tokens."""
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=False) + "\n")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BEGIN,
        "eos_token": END,
        "pad_token": PAD,
        "model_max_length": length,
        "clean_up_tokenization_spaces": False,
        "chat_template": TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
