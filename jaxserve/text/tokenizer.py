# SPDX-License-Identifier: Apache-2.0
"""Loads a model's tokenizer; converts text to token ids and back.

Supports transformers' fast tokenizers, and never runs code from a model's folder.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

from jaxserve.errors import CheckpointError, RequestError, message_of
from jaxserve.text import missing
from jaxserve.text.chat_template import chat_text as chat_template_text
from jaxserve.text.text_length import TextLength, text_length
from jaxserve.text.token_bytes import BROKEN, Decoding, TextStream
from jaxserve.types.sampling_params import BAD_WORD_TOKENS, MAX_BAD_WORDS

MAX_FILE_BYTES = 256 * 2**20  # six times the largest current vocabulary
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


def load(folder: str | Path) -> "Tokenizer":
    """Load the tokenizer of a model folder."""
    folder = Path(folder)
    missing.check(folder)
    if not any((folder / name).is_file() for name in VOCABULARIES):
        problem = f"{folder} has no tokenizer: none of {', '.join(VOCABULARIES)}"
        raise CheckpointError(problem, "set --tokenizer to a folder that has one, or send prompts as token ids")
    for name in (*VOCABULARIES, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
        path = folder / name
        if path.is_file() and path.stat().st_size > MAX_FILE_BYTES:
            raise CheckpointError(f"{path} is larger than {MAX_FILE_BYTES >> 20} MiB", "check the file")
    # Otherwise a pool of threads encodes all texts, where short ones wait for long ones.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # transformers' warnings (torch is missing, the config is old) do not apply to us.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "critical")
    from transformers.models.auto.tokenization_auto import AutoTokenizer

    try:
        loaded: Any = cast(Any, AutoTokenizer).from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # many types, also from other libraries that read vocabularies
        problem = f"transformers cannot load the tokenizer in {folder}: {message_of(error)}"
        raise CheckpointError(problem, "check its files, or send prompts as token ids") from None
    if not loaded.is_fast:
        problem = f"the tokenizer in {folder} is a {type(loaded).__name__}, not a fast tokenizer"
        raise CheckpointError(problem, "convert it to tokenizer.json with transformers")
    return Tokenizer(loaded)


class Encoded(Protocol):
    """A tokenized text. Its length is known before the ids become Python objects."""

    def __len__(self) -> int: ...

    @property
    def ids(self) -> list[int]: ...


class Tokenizer:
    """A fast transformers tokenizer. Thread-safe."""

    def __init__(self, loaded: Any) -> None:
        self._loaded = loaded
        self._backend: Any = loaded.backend_tokenizer
        # tokenizer.json may enable truncation and padding.
        self._backend.no_truncation()
        self._backend.no_padding()
        added: Mapping[int, Any] = self._backend.get_added_tokens_decoder()
        self._added = {token: str(entry.content) for token, entry in added.items()}
        self._special = frozenset(token for token, entry in added.items() if entry.special)
        self._decoding = Decoding(self._backend)
        self.text_length: TextLength = text_length(self._backend)  # the lower bound on token counts by text length
        self._texts: dict[int, str] = {}
        self.vocab_size: int = len(loaded)
        self.eos_token_ids: frozenset[int] = frozenset(
            () if loaded.eos_token_id is None else (int(loaded.eos_token_id),)
        )

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return self.encoded(text, add_special_tokens=add_special_tokens).ids

    def encoded(self, text: str, *, add_special_tokens: bool = True) -> Encoded:
        """Like `encode`, with the number of tokens first. Other Python threads run meanwhile."""
        try:
            if not isinstance(text, str):  # pyright: ignore[reportUnnecessaryIsInstance]
                raise TypeError
            # The backend's `encode` would hold Python's lock for seconds per megabyte.
            [encoded] = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        except TypeError:  # not a string, or a lone surrogate
            shown = ascii(text)[:80]
            raise RequestError(
                "prompt", f"the text {shown} is not a valid Unicode string", "send valid Unicode"
            ) from None
        return encoded

    def encode_pair(self, first: str, second: str) -> list[int]:
        """The ids of two texts in one prompt, joined as the tokenizer does."""
        try:
            return self._backend.encode_batch([(first, second)])[0].ids
        except TypeError:
            raise RequestError("prompt", "a text is not a valid Unicode string", "send valid Unicode") from None

    def template_has_role(self, role: str, chat_template: str | None = None) -> bool:
        """Whether the chat template, or the one given, names this role."""
        template = chat_template or self._loaded.chat_template
        return isinstance(template, str) and (f'"{role}"' in template or f"'{role}'" in template)

    def decode(
        self, ids: Sequence[int], *, skip_special_tokens: bool = True, spaces_between_special_tokens: bool = True
    ) -> str:
        """The text of ids; unknown ids add nothing."""
        stream = self.stream(
            (), skip_special_tokens=skip_special_tokens, spaces_between_special_tokens=spaces_between_special_tokens
        )
        return stream.feed(ids) + stream.finish()

    def stream(
        self, prompt_token_ids: Sequence[int], *, skip_special_tokens: bool, spaces_between_special_tokens: bool
    ) -> TextStream:
        """A stream of the text after the prompt, without the prompt's own text."""
        skipped = self._special if skip_special_tokens else frozenset[int]()
        bare = {} if skip_special_tokens or spaces_between_special_tokens else self._added
        return self._decoding.stream(prompt_token_ids, skipped=skipped, bare=bare)

    def token_text(self, token: int) -> str:
        """One token's text, also of special tokens. A leading space is kept, so that texts can be concatenated; U+FFFD
        stands for parts of a character."""
        text = self._texts.get(token)
        if text is None:
            text = self._decoding.one(token)
            if 0 <= token < self.vocab_size:  # bounds the cache
                self._texts[token] = text
        return text

    def token_bytes(self, token: int) -> bytes | None:
        """One token's bytes, which are its text in UTF-8; None for parts of a character if the tokenizer is neither
        byte-level nor byte-fallback."""
        found = self._decoding.bytes_of(token)
        if found is not None:
            return found
        text = self.token_text(token)
        return None if BROKEN in text else text.encode()

    def bad_word_ids(self, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """The token sequences that spell the words, with and without a leading space.

        As in vLLM, the form with a space counts if it has a different first token and the same number of tokens.
        """
        found: dict[tuple[int, ...], None] = {}
        for word in words:
            plain = tuple(self.encode(word.lstrip(), add_special_tokens=False))
            if not plain:
                raise RequestError(
                    "bad_words", f"bad_words has {ascii(word)[:80]}, which the tokenizer cannot represent", "remove it"
                )
            spaced = tuple(self.encode(" " + word.lstrip(), add_special_tokens=False))
            found[plain] = None
            if spaced and spaced[0] != plain[0] and len(spaced) == len(plain):
                found[spaced] = None
            if len(plain) > BAD_WORD_TOKENS:
                problem = f"bad_words has {ascii(word)[:80]} with {len(plain)} tokens"
                raise RequestError("bad_words", problem, f"use words of at most {BAD_WORD_TOKENS} tokens")
        if len(found) > MAX_BAD_WORDS:
            problem = f"bad_words expands to {len(found)} token sequences, with and without a leading space"
            raise RequestError("bad_words", problem, f"use at most {MAX_BAD_WORDS} sequences")
        return tuple(found)

    def chat_text(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        chat_template: str | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """Render messages with the chat template.

        Templates run in jinja's sandbox, which limits what they can access but not how long they run: accept
        `chat_template` only from trusted callers.
        """
        return chat_template_text(
            self._loaded,
            messages,
            chat_template=chat_template,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            template_kwargs=template_kwargs,
        )
