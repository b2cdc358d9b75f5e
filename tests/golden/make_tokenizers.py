# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: RUF001 - letters that look like others are what a tokenizer has to tell apart
"""Two small tokenizers of the two common kinds, and what transformers makes of some texts with them."""

import json
import tempfile
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer

from tests.golden.load import TOKENIZERS

TEXT = """
A server that streams text has to cut it where a reader would not notice. It holds back the bytes of a character
until all of them are there, and the words of a stop string until it is plain that they are not the stop string.
The tokens of a language model are pieces of words, with the space that comes before them; the newline, the tab and
two  or   three    spaces are tokens as well. Numbers such as 7, 42, 365, 1024 and 65536 are cut from the left.
def fibonacci(n):
    return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)
Le café est déjà prêt, señor; die Straße über den Fluß. Привет, мир! 你好，世界。 こんにちは世界。
The model reads the prompt, the model writes the answer, and the server sends the answer to the reader.
"""

TEXTS = [
    "The model reads the prompt.",
    "",
    " ",
    " leading and trailing ",
    "two  spaces,   three, and\ttabs\n\nand newlines\r\n",
    "def fibonacci(n):\n    return n if n < 2 else fibonacci(n - 1)\n",
    "do n't clean up , these . spaces ?",
    "I'm sure they'll say it isn't OURS",
    "1 22 333 4444 55555 3.14159 1,000,000",
    "Le café déjà prêt, die Straße",
    "cafe\u0301 is not café",
    "Привет, мир! 你好，世界。 مرحبا हिन्दी",
    "emoji 🙂👩‍👩‍👧 and flags 🇳🇱",
    "\u200bzero\u00a0width \ufeff\u2028",
    "<|begin_of_text|>special<|eot_id|> tokens <s> in </s>text<unk>",
    "▁underline ▁▁ <0x41> <|not_special|>",
    "\x00\x01\x7f control",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 ﬁ Ⅷ ½",
]

MESSAGES = [
    {"role": "system", "content": "You answer briefly."},
    {"role": "user", "content": "  Say “hello” 🙂\n"},
    {"role": "assistant", "content": "hello"},
    {"role": "user", "content": "Again, please."},
]

LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
LLAMA3_CHAT = """{{- bos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
LLAMA2_CHAT = (
    "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}{% set system = messages[0]['content'] %}"
    "{% else %}{% set rest = messages %}{% set system = false %}{% endif %}"
    "{% for message in rest %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if loop.index0 == 0 and system %}"
    "{% set content = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}"
    "{% endfor %}"
)


def make() -> dict[str, str]:
    """What each file under TOKENIZERS should hold."""
    files = {**_llama3(), **_llama2()}
    expected: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as root:
        for name, content in files.items():
            (Path(root) / name).parent.mkdir(exist_ok=True)
            (Path(root) / name).write_text(content)
        for kind in ("byte-level", "byte-fallback"):
            expected[kind] = _expected(Path(root) / kind)
    lines = ",\n".join(f" {json.dumps(kind)}: {_lines(expected[kind])}" for kind in expected)
    return {**files, "expected.json": "{\n" + lines + "\n}\n"}


def compare() -> str:
    """What is not as recorded, or nothing."""
    changed = [name for name, content in make().items() if _recorded(TOKENIZERS / name) != content]
    return "another " + ", ".join(changed) if changed else ""


def write() -> None:
    for name, content in make().items():
        (TOKENIZERS / name).parent.mkdir(parents=True, exist_ok=True)
        (TOKENIZERS / name).write_text(content)


def _recorded(file: Path) -> str | None:
    return file.read_text() if file.exists() else None


def _llama3() -> dict[str, str]:
    """Bytes as letters, cut by Llama 3's expression, its special tokens after the others."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    words = pre_tokenizers.Split(Regex(LLAMA3_WORDS), behavior="isolated", invert=False)
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, letters])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=420, show_progress=False, initial_alphabet=alphabet, special_tokens=[])
    tokenizer.train_from_iterator([TEXT], trainer)
    special = ["begin_of_text", "end_of_text", "start_header_id", "end_header_id", "eot_id", "python_tag"]
    tokenizer.add_special_tokens([f"<|{name}|>" for name in special])
    bos = "<|begin_of_text|>"
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    config = {
        "added_tokens_decoder": {str(tokenizer.token_to_id(f"<|{name}|>")): _added(f"<|{name}|>") for name in special},
        "bos_token": bos,
        "clean_up_tokenization_spaces": True,
        "eos_token": "<|eot_id|>",
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": 131072,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    return {
        "byte-level/tokenizer.json": tokenizer.to_str(),
        "byte-level/tokenizer_config.json": json.dumps(config, indent=1),
        "byte-level/chat_template.jinja": LLAMA3_CHAT,
    }


def _llama2() -> dict[str, str]:
    """Spaces as ▁, unknown characters as bytes, <s> before everything; its template in its config."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=300, show_progress=False, special_tokens=[])
    # Rare letters are left to their bytes. The trainer's own limit_alphabet takes another few at each run.
    frequent = "".join(letter for letter in TEXT if letter != "\n" and TEXT.count(letter) > 2)
    trained.train_from_iterator([frequent], trainer)
    model = json.loads(trained.to_str())["model"]
    first = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    names = first + sorted(model["vocab"], key=model["vocab"].__getitem__)
    tokenizer = Tokenizer(
        models.BPE(
            vocab={name: index for index, name in enumerate(names)},
            merges=[tuple(pair) for pair in model["merges"]],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", 1)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    config = {
        "add_bos_token": True,
        "add_eos_token": False,
        "added_tokens_decoder": {str(index): _added(name) for index, name in enumerate(first[:3])},
        "bos_token": "<s>",
        "chat_template": LLAMA2_CHAT,
        "clean_up_tokenization_spaces": False,
        "eos_token": "</s>",
        "legacy": False,
        "model_max_length": 4096,
        "pad_token": None,
        "sp_model_kwargs": {},
        "tokenizer_class": "LlamaTokenizer",
        "unk_token": "<unk>",
    }
    return {
        "byte-fallback/tokenizer.json": tokenizer.to_str(),
        "byte-fallback/tokenizer_config.json": json.dumps(config, indent=1),
    }


def _added(content: str) -> dict[str, Any]:
    return {
        "content": content,
        "lstrip": False,
        "normalized": False,
        "rstrip": False,
        "single_word": False,
        "special": True,
    }


def _expected(folder: Path) -> dict[str, Any]:
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    texts: list[dict[str, Any]] = []
    for text in TEXTS:
        ids = tokenizer(text).input_ids
        texts.append(
            {
                "text": text,
                "ids": ids,
                "decoded": tokenizer.decode(ids),
                "decoded_without_special": tokenizer.decode(ids, skip_special_tokens=True),
            }
        )
    rendered = tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    chat = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=True)
    return {"texts": texts, "messages": MESSAGES, "rendered": rendered, "chat_ids": chat["input_ids"]}


def _lines(content: dict[str, Any]) -> str:
    texts = ",\n".join(f"   {json.dumps(text)}" for text in content["texts"])
    rest = ",\n".join(f"  {json.dumps(key)}: {json.dumps(content[key])}" for key in content if key != "texts")
    return f'{{\n  "texts": [\n{texts}\n  ],\n{rest}\n }}'
