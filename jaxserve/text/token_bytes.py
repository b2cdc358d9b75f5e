# SPDX-License-Identifier: Apache-2.0
"""From tokens to text, bit by bit. A leaf: knows a backend of `tokenizers`, not where it came from.

stream = Decoding(backend).stream(prompt, skipped=special_tokens, bare={})
text = stream.feed([5, 17]) + stream.feed([3]) + stream.finish()

Text is made from each token's bytes, not by decoding again and again: the two common kinds of decoders (byte-level
BPE, and sentencepiece's with byte fallback) give every token bytes of its own, and those of all tokens in a row are
the text in UTF-8. So text that was shown never changes. It equals what `tokenizers` decodes at once, except that
there one broken byte among <0xNN> tokens makes U+FFFD of all those next to it, also of those already shown; here, as
in sentencepiece, only of the broken ones. Any other decoder works on a window of the last tokens, and its text is as
stable as it is.
"""

import codecs
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

BROKEN = "\ufffd"
BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
CHARACTER_BYTES = 4  # at most, in UTF-8
WINDOW = 8  # tokens before a new one that its text may depend on; a character's last byte is nearer than that
EACH_BYTE = "jaxserve.each_byte"


def _mark_each_byte(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return BROKEN * (error.end - error.start), error.end


codecs.register_error(EACH_BYTE, _mark_each_byte)


class TextStream(Protocol):
    def feed(self, ids: Sequence[int]) -> str:
        """The text that these tokens complete; ids that are no token add nothing."""
        ...

    def finish(self) -> str:
        """The rest of the text, when no more tokens come: what stands for parts of a character."""
        ...


class Decoding:
    """What a tokenizer's streams have in common."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        decoder = backend.decoder
        spelling = None if decoder is None else _spelling(json.loads(decoder.__getstate__()))
        self._bytes = None if spelling is None else _TokenBytes(backend, spelling)

    def stream(self, prompt: Sequence[int], *, skipped: frozenset[int], bare: Mapping[int, str]) -> TextStream:
        """What tokens after the prompt's say, without what the prompt itself says.

        skipped: tokens that say nothing. bare: those that get no space between them, with their texts.
        """
        if self._bytes is not None:
            return _ByteText(self._bytes, skipped, prompt)
        return _WindowText(self._backend, skipped, bare, prompt)

    def one(self, token: int) -> str:
        """A token alone, with the space that it begins with; U+FFFD stands for parts of a character."""
        if self._bytes is None:
            return str(self._backend.decode(_possible([token]), skip_special_tokens=False))
        return codecs.utf_8_decode(self._bytes[token], self._bytes.spelling.errors, True)[0]

    def bytes_of(self, token: int) -> bytes | None:
        """Those of a token, also where they are a part of a character only; None where it has none of its own."""
        return None if self._bytes is None else self._bytes[token]


@dataclass(frozen=True)
class _Spelling:
    """How a decoder makes bytes of each token."""

    byte_level: bool = False  # a letter for each byte
    replaced: tuple[tuple[str, str], ...] = ()
    byte_fallback: bool = False  # <0xNN> is a byte
    stripped: str = ""  # one of these leaves the start of all text

    @property
    def errors(self) -> str:
        return EACH_BYTE if self.byte_fallback else "replace"


def _spelling(decoder: Mapping[str, Any]) -> _Spelling | None:
    """None if a token's text may depend on other tokens in ways not known here."""
    steps: list[Mapping[str, Any]] = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    kinds = [str(step["type"]) for step in steps]
    if kinds == ["ByteLevel"]:
        return _Spelling(byte_level=True)
    replacing = [step for step in steps if step["type"] == "Replace"]
    rest = kinds[len(replacing) :]  # a kind out of this order makes the comparison fail
    if rest not in (["ByteFallback", "Fuse"], ["ByteFallback", "Fuse", "Strip"]):
        return None
    if any("String" not in step["pattern"] for step in replacing):
        return None
    strip = steps[-1] if rest[-1] == "Strip" else {"content": "", "start": 1, "stop": 0}
    if strip["start"] != 1 or strip["stop"] != 0:
        return None
    replaced = tuple((str(step["pattern"]["String"]), str(step["content"])) for step in replacing)
    return _Spelling(replaced=replaced, byte_fallback=True, stripped=str(strip["content"]))


def _alphabet() -> dict[str, int]:
    """The letters of byte-level BPE: each byte that prints is its own, the others follow from U+0100 on."""
    printed = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printed]
    return {chr(byte): byte for byte in printed} | {chr(0x100 + place): byte for place, byte in enumerate(others)}


_ALPHABET = _alphabet()


class _TokenBytes(dict[int, bytes]):
    """The bytes of every token asked for; at most those of the vocabulary."""

    def __init__(self, backend: Any, spelling: _Spelling) -> None:
        super().__init__()
        self._backend = backend
        self.spelling = spelling

    def __missing__(self, token: int) -> bytes:
        try:
            name = self._backend.id_to_token(token)
        except OverflowError:  # below zero, or beyond what any id can be
            name = None
        if name is None:
            return b""
        self[token] = spelled = self._spell(str(name))
        return spelled

    def _spell(self, name: str) -> bytes:
        if self.spelling.byte_level:
            try:
                return bytes(_ALPHABET[letter] for letter in name)
            except KeyError:  # an added token is spelled as it is
                return name.encode()
        for old, new in self.spelling.replaced:
            name = name.replace(old, new)
        byte = BYTE_TOKEN.fullmatch(name)
        return bytes([int(byte[1], 16)]) if byte else name.encode()


class _ByteText:
    def __init__(self, token_bytes: _TokenBytes, skipped: frozenset[int], prompt: Sequence[int]) -> None:
        self._token_bytes = token_bytes
        self._errors = token_bytes.spelling.errors
        self._skipped = skipped
        self._strip = token_bytes.spelling.stripped
        self._rest = b""  # the first bytes of a character
        end = b""
        for token in reversed(prompt):
            if len(end) >= CHARACTER_BYTES:
                break
            if token not in skipped:
                end = token_bytes[token] + end
        if end:  # a character that the prompt began goes on, and this is not the start of the text
            _, read = codecs.utf_8_decode(end, self._errors, False)
            self._rest = end[read:]
            self._strip = ""

    def feed(self, ids: Sequence[int]) -> str:
        token_bytes, skipped = self._token_bytes, self._skipped
        return self._decode(b"".join([token_bytes[token] for token in ids if token not in skipped]), final=False)

    def finish(self) -> str:
        return self._decode(b"", final=True)

    def _decode(self, new: bytes, *, final: bool) -> str:
        new = self._rest + new
        text, read = codecs.utf_8_decode(new, self._errors, final)
        self._rest = new[read:]
        if self._strip and text:
            text = text.removeprefix(self._strip)
            self._strip = ""
        return text


class _WindowText:
    """Decodes the last tokens with and without the new ones; what is more is the new text."""

    def __init__(self, backend: Any, skipped: frozenset[int], bare: Mapping[int, str], prompt: Sequence[int]) -> None:
        self._backend = backend
        self._skipped = skipped
        self._bare = bare  # added tokens that get no space between them
        self._context = [token for token in _possible(prompt[-WINDOW:]) if token not in skipped]
        self._new: list[int] = []

    def feed(self, ids: Sequence[int]) -> str:
        ids = [token for token in _possible(ids) if token not in self._skipped]
        if not self._bare:
            self._new += ids
            return self._take(final=False)
        parts: list[str] = []
        for token in ids:
            before = (self._context + self._new)[-1:]
            if token in self._bare and before and before[0] in self._bare:
                parts += [self.finish(), self._bare[token]]
                self._context = [token]
            else:
                self._new.append(token)
                parts.append(self._take(final=False))
        return "".join(parts)

    def finish(self) -> str:
        return self._take(final=True)

    def _take(self, *, final: bool) -> str:
        taken, text = self._new, ""
        # The last tokens may be the beginning of a character, each with a byte of it.
        for held in range(1 if final else CHARACTER_BYTES):
            taken = self._new[: len(self._new) - held]
            text = self._decode(self._context + taken)
            if not text.endswith(BROKEN):
                break
        if not taken:
            return ""
        before = self._decode(self._context)
        self._context, self._new = (self._context + taken)[-WINDOW:], self._new[len(taken) :]
        return text[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        # Of no tokens some decoders cannot make a text: they panic.
        return str(self._backend.decode(ids, skip_special_tokens=False)) if ids else ""


def _possible(ids: Sequence[int]) -> list[int]:
    """Those that a tokenizer can be asked for at all."""
    return [token for token in ids if 0 <= token < 2**32]
