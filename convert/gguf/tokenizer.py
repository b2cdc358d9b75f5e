# SPDX-License-Identifier: Apache-2.0
"""The tokenizer of a GGUF file as a tokenizer.json and a tokenizer_config.json.

tokenizer.ggml.model is "gpt2" for byte-level BPE, whose merges are listed, or "llama" for SentencePiece's BPE, whose
merges follow from the scores of the tokens: of all neighbours that make a token, the pair that makes the one with the
highest score is merged first.
"""

from typing import Any, NoReturn

from convert.files.header import quote
from convert.gguf import pre_tokenizers
from convert.gguf.fields import Fields
from jaxserve.errors import CheckpointError, one_line

HINT = "set --tokenizer to a folder or a Hub model with the tokenizer of the original model"
SPACE = "\u2581"
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 1, 2, 3, 4, 6  # in tokenizer.ggml.token_type
MODELS = ("gpt2", "llama")

# Tokens that end a turn, whatever the file's eos_token_id is: base models' files become chat models' unchanged.
ENDS = (
    *("<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<end_of_turn>", "<|endoftext|>", "<|eom_id|>"),
    *("<EOT>", "<|end_of_text|>", "<end_of_utterance>", "<\uff5cend\u2581of\u2581sentence\uff5c>", "[EOS]"),
)


class Vocabulary:
    """The tokens of a file, and which of them are special."""

    def __init__(self, fields: Fields) -> None:
        tokens = fields.items("tokenizer.ggml.tokens", str)
        if not tokens:
            _refuse(fields, "has no tokenizer: no 'tokenizer.ggml.tokens'")
        self.tokens: list[str] = [text or f"[EMPTY_{i}]" for i, text in enumerate(tokens)]
        self.ids = {text: token for token, text in enumerate(self.tokens)}
        if len(self.ids) != len(self.tokens):
            _refuse(fields, "has two tokens with the same text")
        types = fields.items("tokenizer.ggml.token_type", int) or [_NORMAL] * len(self.tokens)
        if len(types) != len(self.tokens):
            _refuse(fields, f"has {len(types)} token types for {len(self.tokens)} tokens")
        self.types: list[int] = types
        self.special = {
            name: self._special(fields, f"tokenizer.ggml.{key}_token_id")
            for name, key in {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}.items()
        }
        ends = [
            self.special["eos"],
            *(self._special(fields, f"tokenizer.ggml.{key}_token_id") for key in ("eot", "eom")),
        ]
        known = (token for text in ENDS if (token := self.ids.get(text)) is not None and types[token] != _NORMAL)
        self.ends = sorted({token for token in (*ends, *known) if token is not None})

    def _special(self, fields: Fields, key: str) -> int | None:
        value = fields.header.pairs.get(key)
        return value if isinstance(value, int) and 0 <= value < len(self.tokens) else None

    def added(self, *, rstrip: bool) -> list[dict[str, Any]]:
        """The tokens that are found in the text before all others."""
        named = {token for token in self.special.values() if token is not None}
        found: list[dict[str, Any]] = []
        for token, (text, kind) in enumerate(zip(self.tokens, self.types, strict=True)):
            special = kind in (_CONTROL, _UNKNOWN) or token in named
            if special or kind == _USER_DEFINED:
                entry = {"id": token, "content": text, "special": special, "normalized": False, "single_word": False}
                strips = rstrip and special and text not in ("<unk>", "<s>", "<|endoftext|>")
                found.append({**entry, "lstrip": False, "rstrip": strips})
        return found


def files_of(fields: Fields, vocabulary: Vocabulary) -> dict[str, dict[str, Any]]:
    """The contents of the tokenizer's files. Raises a CheckpointError if there is no way to build it."""
    kind = fields.text("tokenizer.ggml.model", "")
    if kind not in MODELS:
        _refuse(fields, f"has a tokenizer of model {quote(kind)}, supported are {' and '.join(MODELS)}")
    built = _byte_level(fields, vocabulary) if kind == "gpt2" else _sentencepiece(fields, vocabulary)
    return {"tokenizer.json": built, "tokenizer_config.json": _config(fields, vocabulary)}


def _refuse(fields: Fields, problem: str) -> NoReturn:
    raise CheckpointError(f"{one_line(str(fields.header.file), limit=1000)}: {problem}", HINT)


def _config(fields: Fields, vocabulary: Vocabulary) -> dict[str, Any]:
    named = {
        f"{name}_token": vocabulary.tokens[token] for name, token in vocabulary.special.items() if token is not None
    }
    template = fields.text("tokenizer.chat_template", "")
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **named,
        "clean_up_tokenization_spaces": False,
        **({"chat_template": template} if template else {}),
    }


def _built(
    fields: Fields, vocabulary: Vocabulary, *, begins: bool, rstrip: bool = False, **parts: Any
) -> dict[str, Any]:
    """A tokenizer.json with these parts."""
    wanted = {"bos": fields.flag("tokenizer.ggml.add_bos_token", begins)}
    wanted["eos"] = fields.flag("tokenizer.ggml.add_eos_token", False)
    around = {name: vocabulary.special[name] for name, wants in wanted.items() if wants}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": vocabulary.added(rstrip=rstrip),
        "post_processor": _around(vocabulary, around.get("bos"), around.get("eos")),
        **parts,
    }


def _around(vocabulary: Vocabulary, bos: int | None, eos: int | None) -> dict[str, Any] | None:
    if bos is None and eos is None:
        return None

    def sequence(name: str, number: int) -> list[dict[str, Any]]:
        ends = ([each] if each is not None else [] for each in (bos, eos))
        before, after = (
            [{"SpecialToken": {"id": vocabulary.tokens[i], "type_id": number}} for i in each] for each in ends
        )
        return [*before, {"Sequence": {"id": name, "type_id": number}}, *after]

    special = {
        vocabulary.tokens[token]: {"id": vocabulary.tokens[token], "ids": [token], "tokens": [vocabulary.tokens[token]]}
        for token in (bos, eos)
        if token is not None
    }
    pair = [*sequence("A", 0), *sequence("B", 1)]
    return {"type": "TemplateProcessing", "single": sequence("A", 0), "pair": pair, "special_tokens": special}


def _bpe(**more: Any) -> dict[str, Any]:
    plain = {"dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None}
    return {"type": "BPE", **plain, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False, **more}


def _byte_level(fields: Fields, vocabulary: Vocabulary) -> dict[str, Any]:
    name = fields.text("tokenizer.ggml.pre", "")
    if name not in pre_tokenizers.PATTERNS:
        shown = (
            f"the unknown pre-tokenizer {quote(name)}"
            if name
            else "no 'tokenizer.ggml.pre', which names its pre-tokenizer"
        )
        _refuse(fields, f"has {shown}: its rule for splitting text into tokens is unknown")
    listed = fields.items("tokenizer.ggml.merges", str)
    if listed is None:
        _refuse(fields, "has no 'tokenizer.ggml.merges', which byte-level BPE needs")
    merges = [text.split(" ") for text in listed]
    for pair in merges:
        if len(pair) != 2 or not {*pair, "".join(pair)} <= vocabulary.ids.keys():
            _refuse(fields, f"has the merge {quote(' '.join(pair))}, which is not one of two tokens to a third")
    model = _bpe(vocab=vocabulary.ids, merges=merges, ignore_merges=name in pre_tokenizers.WHOLE_WORDS)
    return _built(
        fields,
        vocabulary,
        begins=name in pre_tokenizers.BEGINS,
        normalizer={"type": "NFC"} if name in pre_tokenizers.COMPOSED else None,
        pre_tokenizer=pre_tokenizers.pre_tokenizer(name),
        decoder={"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        model=model,
    )


def _sentencepiece(fields: Fields, vocabulary: Vocabulary) -> dict[str, Any]:
    scores = fields.items("tokenizer.ggml.scores", float)
    if scores is None or len(scores) != len(vocabulary.tokens):
        _refuse(fields, "has no 'tokenizer.ggml.scores' with one score for each token")
    unknown = vocabulary.special["unk"]
    model = _bpe(
        vocab=vocabulary.ids,
        merges=_merges(vocabulary, scores),
        unk_token=None if unknown is None else vocabulary.tokens[unknown],
        fuse_unk=True,
        byte_fallback=_BYTE in vocabulary.types,
    )
    prefixed = fields.flag("tokenizer.ggml.add_space_prefix", True)
    spaces: dict[str, Any] = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    back: dict[str, Any] = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    first = [{"type": "Prepend", "prepend": SPACE}] if prefixed else []
    last = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefixed else []
    return _built(
        fields,
        vocabulary,
        begins=True,
        rstrip=fields.architecture == "phi3",
        normalizer={"type": "Sequence", "normalizers": [*first, spaces]},
        pre_tokenizer=None,
        decoder={"type": "Sequence", "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}, *last]},
        model=model,
    )


def _merges(vocabulary: Vocabulary, scores: list[float]) -> list[tuple[str, str]]:
    """Every pair of tokens that makes a third; those that make the one with the highest score first."""
    ids, found = vocabulary.ids, list[tuple[float, int, str, str]]()
    for token, text in enumerate(vocabulary.tokens):
        for at in range(1, min(len(text), _LONGEST)):
            left, right = text[:at], text[at:]
            if left in ids and right in ids:
                found.append((-scores[token], token, left, right))
    found.sort(key=lambda each: each[:2])
    return [(left, right) for _, _, left, right in found]


_LONGEST = 1000  # characters of a token
