# SPDX-License-Identifier: Apache-2.0
"""A lower bound on a text's token count from its length alone, because encoding a megabyte takes most of a second.

A token stands for at most as many characters as the longest token spells, unless the tokenizer drops or joins
characters first. The components known not to do so are listed here; with any other, a token is assumed to stand for
GENEROUS times as many characters, and white space for none.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, cast

GENEROUS = 8  # composing accents (NFC) joins at most four characters into one
SPACES = "".join(filter(str.isspace, map(chr, range(0x3001))))  # all that Unicode has

_KEEP = {"Prepend", "ByteLevel", "Lowercase", "NFD", "NFKD", "Digits", "Metaspace", "UnicodeScripts"}
_DROP_SPACES = {"Strip", "Whitespace", "WhitespaceSplit"}


class _Loss(IntEnum):
    NONE = 0
    SPACES = 1
    ANY = 2


@dataclass(frozen=True)
class TextLength:
    per_token: int  # maximum characters per token
    spaces_count: bool

    def fewest_tokens(self, text: str) -> int:
        characters = len(text)
        if not self.spaces_count:
            characters -= sum(map(text.count, SPACES))
        return -(-characters // self.per_token)


def text_length(backend: Any) -> TextLength:
    vocabulary: Mapping[str, int] = backend.get_vocab(with_added_tokens=True)
    parts = [*_parts(backend.normalizer), *_parts(backend.pre_tokenizer)]
    lost = max([_lost_by(part) for part in parts], default=_Loss.NONE)
    if not _spells_all(backend.model, vocabulary, parts):
        lost = _Loss.ANY
    if any(token.lstrip or token.rstrip for token in backend.get_added_tokens_decoder().values()):
        lost = max(lost, _Loss.SPACES)
    longest = max(map(len, vocabulary), default=1)
    return TextLength(longest if lost < _Loss.ANY else GENEROUS * longest, lost == _Loss.NONE)


def _parts(whole: Any) -> Iterator[Mapping[str, Any]]:
    """The components of a normalizer or pre-tokenizer, as in tokenizer.json."""
    if whole is None:
        return
    todo: list[Mapping[str, Any]] = [json.loads(whole.__getstate__())]
    while todo:
        part = todo.pop()
        nested = part.get("normalizers") or part.get("pretokenizers")
        if part["type"] == "Sequence":
            todo += cast("list[Mapping[str, Any]]", nested or [])
        else:
            yield part


def _lost_by(part: Mapping[str, Any]) -> _Loss:
    kind = str(part["type"])
    if kind in _DROP_SPACES:
        return _Loss.SPACES
    if kind == "Replace":
        old = part["pattern"].get("String")  # a pattern may match any number of characters
        return _Loss.NONE if old is not None and len(part["content"]) >= len(old) else _Loss.ANY
    if kind in ("Split", "Punctuation"):
        return _Loss.ANY if part["behavior"] == "Removed" else _Loss.NONE
    return _Loss.NONE if kind in _KEEP else _Loss.ANY


def _spells_all(model: Any, vocabulary: Mapping[str, int], parts: list[Mapping[str, Any]]) -> bool:
    """Whether every byte has a token. Otherwise unknown text is dropped, or much of it becomes one token."""
    from tokenizers.pre_tokenizers import ByteLevel

    if type(model).__name__ != "BPE":
        return False
    if any(part["type"] == "ByteLevel" for part in parts):
        return all(letter in vocabulary for letter in ByteLevel.alphabet())
    return model.byte_fallback and all(f"<0x{byte:02X}>" in vocabulary for byte in range(256))
