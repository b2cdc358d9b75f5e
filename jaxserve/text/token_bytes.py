# SPDX-License-Identifier: Apache-2.0
"""Incremental token-to-text conversion on a `tokenizers` backend.

stream = Decoding(backend).stream(prompt, skipped=special_tokens, bare={})
text = stream.feed([5, 17]) + stream.feed([3]) + stream.finish()

Text is built from each token's bytes instead of repeated decoding: with the two common decoders (byte-level BPE, and
sentencepiece with byte fallback) every token has fixed bytes, and their concatenation is the text in UTF-8. So text
that was returned never changes. It equals what `tokenizers` decodes in one call, with one exception: there, one
invalid byte among <0xNN> tokens turns all adjacent ones into U+FFFD, even those already returned; here, as in
sentencepiece, only the invalid ones. Other decoders run on a window of the last tokens, and their text is as stable as
the decoder allows.
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
PIECE = 4096  # tokens converted at once, which takes less than a millisecond of Python's lock
WINDOW = 8  # preceding tokens that a token's text may depend on; more than the bytes of a character
EACH_BYTE = "jaxserve.each_byte"


def _mark_each_byte(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return BROKEN * (error.end - error.start), error.end


codecs.register_error(EACH_BYTE, _mark_each_byte)


class TextStream(Protocol):
    def feed(self, ids: Sequence[int]) -> str:
        """The text that these tokens complete; unknown ids add nothing."""
        ...

    def finish(self) -> str:
        """The rest of the text after the last token: replacement characters for incomplete ones."""
        ...


class Decoding:
    """The data shared by all streams of one tokenizer."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        decoder = backend.decoder
        spelling = None if decoder is None else _spelling(json.loads(decoder.__getstate__()))
        self._bytes = None if spelling is None else _TokenBytes(backend, spelling)

    def stream(self, prompt: Sequence[int], *, skipped: frozenset[int], bare: Mapping[int, str]) -> TextStream:
        """A stream of the text after the prompt, without the prompt's own text.

        skipped: tokens that say nothing. bare: those that get no space between them, with their texts.
        """
        if self._bytes is not None:
            return _ByteText(self._bytes, skipped, prompt)
        return _WindowText(self._backend, skipped, bare, prompt)

    def one(self, token: int) -> str:
        """One token's text, including a leading space. U+FFFD stands for parts of a character."""
        if self._bytes is None:
            return str(self._backend.decode(_possible([token]), skip_special_tokens=False))
        return codecs.utf_8_decode(self._bytes[token], self._bytes.spelling.errors, True)[0]

    def bytes_of(self, token: int) -> bytes | None:
        """A token's bytes, even if they are only part of a character; None if the decoder gives it no fixed bytes."""
        return None if self._bytes is None else self._bytes[token]


@dataclass(frozen=True)
class _Spelling:
    """How a decoder converts each token to bytes."""

    byte_level: bool = False  # one letter per byte
    replaced: tuple[tuple[str, str], ...] = ()
    byte_fallback: bool = False  # <0xNN> is a byte
    stripped: str = ""  # one of these is stripped from the start of the text

    @property
    def errors(self) -> str:
        return EACH_BYTE if self.byte_fallback else "replace"


def _spelling(decoder: Mapping[str, Any]) -> _Spelling | None:
    """None if a token's text may depend on other tokens in unsupported ways."""
    steps: list[Mapping[str, Any]] = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    kinds = [str(step["type"]) for step in steps]
    if kinds == ["ByteLevel"]:
        return _Spelling(byte_level=True)
    replacing = [step for step in steps if step["type"] == "Replace"]
    rest = kinds[len(replacing) :]  # a step out of order fails the comparison below
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
    """The alphabet of byte-level BPE: printable bytes map to themselves, the others to U+0100 and up."""
    printed = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printed]
    return {chr(byte): byte for byte in printed} | {chr(0x100 + place): byte for place, byte in enumerate(others)}


_ALPHABET = _alphabet()


class _TokenBytes(dict[int, bytes]):
    """A cache of each token's bytes, bounded by the vocabulary."""

    def __init__(self, backend: Any, spelling: _Spelling) -> None:
        super().__init__()
        self._backend = backend
        self.spelling = spelling

    def __missing__(self, token: int) -> bytes:
        try:
            name = self._backend.id_to_token(token)
        except OverflowError:  # negative, or too large for an id
            name = None
        if name is None:
            return b""
        self[token] = spelled = self._spell(str(name))
        return spelled

    def _spell(self, name: str) -> bytes:
        if self.spelling.byte_level:
            try:
                return bytes(_ALPHABET[letter] for letter in name)
            except KeyError:  # an added token is stored as plain text
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
        if end:  # continues a character that the prompt began, so this is not the start of the text
            _, read = codecs.utf_8_decode(end, self._errors, False)
            self._rest = end[read:]
            self._strip = ""

    def feed(self, ids: Sequence[int]) -> str:
        if len(ids) > PIECE:
            return "".join(self.feed(ids[begin : begin + PIECE]) for begin in range(0, len(ids), PIECE))
        token_bytes, skipped = self._token_bytes, self._skipped
        if len(ids) == 1:
            new = b"" if ids[0] in skipped else token_bytes[ids[0]]
            if not (self._rest or self._strip) and new.isascii():
                return new.decode("ascii")
        else:
            new = b"".join([token_bytes[token] for token in ids if token not in skipped])
        return self._decode(new, final=False)

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
    """Decodes the last tokens with and without the new ones; the difference is the new text."""

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
        # The last tokens may be the first bytes of an incomplete character.
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
        # Some decoders panic on an empty list. Unlike `decode`, this method does not hold Python's lock.
        return str(self._backend.decode_batch([ids], skip_special_tokens=False)[0]) if ids else ""


def _possible(ids: Sequence[int]) -> list[int]:
    """The ids that the tokenizers library accepts."""
    return [token for token in ids if 0 <= token < 2**32]
