# SPDX-License-Identifier: Apache-2.0
"""Text to token ids and back: encoding, chat templates, and decoding while tokens still arrive.

Knows transformers' fast tokenizers, nothing of models or engines, and runs no code of a model's folder.
"""

import functools
import inspect
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from jaxserve.errors import CheckpointError, RequestError, one_line
from jaxserve.text.text_length import TextLength, text_length
from jaxserve.text.token_bytes import BROKEN, Decoding, TextStream
from jaxserve.types.sampling_params import BAD_WORD_TOKENS, MAX_BAD_WORDS, SamplingParams

MAX_FILE_BYTES = 256 * 2**20  # the largest vocabularies of today take a sixth of it
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


def load(folder: str | Path) -> "Tokenizer":
    """The tokenizer of a model's folder on disk."""
    folder = Path(folder)
    if not any((folder / name).is_file() for name in VOCABULARIES):
        problem = f"{folder} has no tokenizer: none of {', '.join(VOCABULARIES)}"
        raise CheckpointError(problem, "name a folder that has one, or give prompts as token ids")
    for name in (*VOCABULARIES, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
        path = folder / name
        if path.is_file() and path.stat().st_size > MAX_FILE_BYTES:
            raise CheckpointError(f"{path} is larger than {MAX_FILE_BYTES >> 20} MiB", "check the file")
    # Its advice is for those who run its models: that torch is missing, that a config is of an old form.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "critical")
    from transformers.models.auto.tokenization_auto import AutoTokenizer

    try:
        loaded: Any = cast(Any, AutoTokenizer).from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # of many kinds, also of other libraries that read a vocabulary
        problem = f"transformers cannot load the tokenizer in {folder}: {_told(error)}"
        raise CheckpointError(problem, "check its files, or give prompts as token ids") from None
    if not loaded.is_fast:
        problem = f"the tokenizer in {folder} is a {type(loaded).__name__}, which has no fast form"
        raise CheckpointError(problem, "save it with transformers as tokenizer.json")
    return Tokenizer(loaded)


def _told(error: BaseException) -> str:
    return one_line(str(error) or type(error).__name__, limit=400)


class Tokenizer:
    """A fast tokenizer of transformers. May be used by several threads at once."""

    def __init__(self, loaded: Any) -> None:
        self._loaded = loaded
        self._backend: Any = loaded.backend_tokenizer
        # A vocabulary file may ask to cut or fill all that it encodes.
        self._backend.no_truncation()
        self._backend.no_padding()
        added: Mapping[int, Any] = self._backend.get_added_tokens_decoder()
        self._added = {token: str(entry.content) for token, entry in added.items()}
        self._special = frozenset(token for token, entry in added.items() if entry.special)
        self._decoding = Decoding(self._backend)
        self._texts: dict[int, str] = {}
        self.vocab_size: int = len(loaded)
        self.eos_token_ids: frozenset[int] = frozenset(
            () if loaded.eos_token_id is None else (int(loaded.eos_token_id),)
        )

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        try:
            return self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        except TypeError:  # no string, or half of a surrogate pair
            shown = ascii(text)[:80]
            raise RequestError("prompt", f"the text {shown} is no Unicode string", "send valid Unicode") from None

    @functools.cached_property
    def text_length(self) -> TextLength:
        """What the length of a text says of its tokens."""
        return text_length(self._backend)

    def decode(
        self, ids: Sequence[int], *, skip_special_tokens: bool = True, spaces_between_special_tokens: bool = True
    ) -> str:
        """The text of ids; of those that are no token, nothing."""
        stream = self.stream(
            (), skip_special_tokens=skip_special_tokens, spaces_between_special_tokens=spaces_between_special_tokens
        )
        return stream.feed(ids) + stream.finish()

    def stream(
        self, prompt_token_ids: Sequence[int], *, skip_special_tokens: bool, spaces_between_special_tokens: bool
    ) -> TextStream:
        """What tokens after the prompt's say; nothing of what the prompt itself says."""
        skipped = self._special if skip_special_tokens else frozenset[int]()
        bare = {} if skip_special_tokens or spaces_between_special_tokens else self._added
        return self._decoding.stream(prompt_token_ids, skipped=skipped, bare=bare)

    def token_text(self, token: int) -> str:
        """One token alone, special ones too. A space that it begins with is kept, so that the texts of tokens can be
        put together; U+FFFD stands for parts of a character."""
        text = self._texts.get(token)
        if text is None:
            text = self._decoding.one(token)
            if 0 <= token < self.vocab_size:  # so that the cache cannot grow beyond it
                self._texts[token] = text
        return text

    def token_bytes(self, token: int) -> bytes | None:
        """The bytes of one token, in UTF-8 those of its text; None for parts of a character that a tokenizer of another
        kind than byte-level or byte-fallback has."""
        found = self._decoding.bytes_of(token)
        if found is not None:
            return found
        text = self.token_text(token)
        return None if BROKEN in text else text.encode()

    def bad_word_ids(self, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """The token sequences that spell the words, as such and after a space.

        As in vLLM, the form after a space counts where it is another first token and as many tokens.
        """
        found: dict[tuple[int, ...], None] = {}
        for word in words:
            plain = tuple(self.encode(word.lstrip(), add_special_tokens=False))
            if not plain:
                raise RequestError("bad_words", f"bad_words has {ascii(word)[:80]}, which no token spells", "drop it")
            spaced = tuple(self.encode(" " + word.lstrip(), add_special_tokens=False))
            found[plain] = None
            if spaced and spaced[0] != plain[0] and len(spaced) == len(plain):
                found[spaced] = None
            if len(plain) > BAD_WORD_TOKENS:
                problem = f"bad_words has {ascii(word)[:80]} of {len(plain)} tokens"
                raise RequestError("bad_words", problem, f"give words of at most {BAD_WORD_TOKENS} tokens")
        if len(found) > MAX_BAD_WORDS:
            problem = f"bad_words stands for {len(found)} token sequences, words and words after a space"
            raise RequestError("bad_words", problem, f"give words for at most {MAX_BAD_WORDS}")
        return tuple(found)

    def render_chat(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> list[int]:
        """The ids of `chat_text`, which names the options. A template writes its special tokens itself."""
        return self.encode(self.chat_text(messages, **options), add_special_tokens=False)

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
        """What the chat template makes of messages.

        Templates run in jinja's sandbox, which bounds what they reach but not how long they run: take
        `chat_template` only from those you trust.
        """
        _check_messages(messages)
        if tools is not None and not all(isinstance(tool, Mapping) for tool in _listed("tools", tools)):
            raise RequestError("tools", "a tool is no object", "describe each tool as a JSON object")
        if continue_final_message and add_generation_prompt:
            problem = "continue_final_message and add_generation_prompt are both set, and contradict each other"
            raise RequestError("continue_final_message", problem, "set add_generation_prompt to false")
        extra = dict(template_kwargs or {})
        for name in extra:
            if name in _reserved_names():
                problem = f"chat_template_kwargs sets {one_line(name)!r}, which is no variable of a template"
                raise RequestError("chat_template_kwargs", problem, "leave it out")
        if chat_template is None and self._loaded.chat_template is None:
            problem = "the model's tokenizer has no chat template"
            raise RequestError("chat_template", problem, "give one, or send the whole prompt as a completion")
        try:
            return self._loaded.apply_chat_template(
                [_plain(message, index) for index, message in enumerate(messages)],
                chat_template=chat_template,
                tools=None if tools is None else [dict(tool) for tool in tools],
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                tokenize=False,
                **extra,
            )
        except RequestError:
            raise
        except Exception as error:  # a template can fail in any way
            problem = f"the chat template does not take these messages: {_told(error)}"
            raise RequestError("messages", problem, "send messages in the form that the model was trained on") from None


def _listed(field: str, value: object) -> Sequence[object]:
    if isinstance(value, str | bytes) or not isinstance(value, Sequence):
        raise RequestError(field, f"{field} is of type {type(value).__name__}", "give a list of objects")
    return cast("Sequence[object]", value)


def _check_messages(messages: object) -> None:
    listed = _listed("messages", messages)
    if not listed:
        raise RequestError("messages", "messages is empty", "give at least one")
    for index, message in enumerate(listed):
        if not isinstance(message, Mapping) or not isinstance(cast("Mapping[str, object]", message).get("role"), str):
            raise RequestError("messages", f"messages[{index}] is no object with a role", 'give {"role": …, …}')


def _plain(message: Mapping[str, Any], index: int) -> dict[str, Any]:
    """The message with its content as one string: templates would print a list of parts as Python does."""
    content: object = message.get("content")
    if isinstance(content, str) or (content is None and message["role"] == "assistant"):
        return dict(message)
    texts: list[str] = []
    for part in _listed(f"messages[{index}].content", content):
        fields = cast("Mapping[str, object]", part) if isinstance(part, Mapping) else dict[str, object]()
        text = fields.get("text")
        if fields.get("type") != "text" or not isinstance(text, str):
            kind = one_line(str(fields.get("type", "unknown")))
            problem = f"messages[{index}] has a part of type {kind!r}: models here take text alone"
            raise RequestError("messages", problem, 'send parts as {"type": "text", "text": …}')
        texts.append(text)
    return {**message, "content": "\n".join(texts)}


@functools.cache
def _reserved_names() -> frozenset[str]:
    """What apply_chat_template takes for itself, or hands to the template by itself."""
    from transformers import tokenization_utils_base
    from transformers.utils import chat_template_utils

    takers = (
        cast(Any, tokenization_utils_base).PreTrainedTokenizerBase.apply_chat_template,
        cast(Any, chat_template_utils).render_jinja_template,
    )
    return frozenset({"messages"}.union(*(inspect.signature(taker).parameters for taker in takers)))


class IncrementalDetokenizer:
    """The text of one sample while its tokens arrive, and where a stop string ends it.

    Of the stop strings that end in the text of the same token the one that ends first counts; of those, the one that
    begins first. What the first `min_tokens` tokens complete does not count. Nothing is decoded before it is needed.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int], params: SamplingParams) -> None:
        self._source = tokenizer.stream(
            prompt_token_ids,
            skip_special_tokens=params.skip_special_tokens,
            spaces_between_special_tokens=params.spaces_between_special_tokens,
        )
        self._stops = params.stops
        self._include = params.include_stop_str_in_output
        self._min_tokens = params.min_tokens
        self._reach = max(map(len, self._stops), default=1) - 1  # a stop string may have begun so far back
        self._end = ""  # the last `_reach` characters
        self._waiting: list[int] = []  # tokens not yet decoded
        self._shown = io.StringIO()  # text given out
        self._held: list[str] = []  # the rest of it
        self._ended = False
        self.token_count = 0  # of the tokens that belong to the output

    def append(self, ids: Sequence[int], *, stopped: bool = False) -> str | None:
        """Adds tokens; returns the stop string that they complete. What comes after that is dropped.

        stopped: the last of them is a stop token, which shows only where include_stop_str_in_output is set.
        """
        if self._ended:
            return None
        shown = ids[:-1] if stopped and not self._include else ids
        if not self._stops:
            self._waiting += shown
            self.token_count += len(ids)
            return None
        for place, token in enumerate(shown):
            text = self._source.feed((token,))
            if text and (found := self._search(text, self.token_count + place + 1)):
                self._ended = True
                self.token_count += place + 1
                return found
        self.token_count += len(ids)
        return None

    def _search(self, text: str, count: int) -> str | None:
        """Adds the text of token `count`; if it completes a stop string, cuts there."""
        self._held.append(text)
        window = self._end + text
        old = len(self._end)
        self._end = window[-self._reach :] if self._reach else ""
        if count <= self._min_tokens:
            return None
        best: tuple[int, int, str] | None = None
        for stop in self._stops:
            begin = window.find(stop, max(old - len(stop) + 1, 0))
            if begin >= 0:
                this = (begin + len(stop), begin, stop)
                best = this if best is None else min(best, this)
        if best is None:
            return None
        end, begin, stop = best
        surplus = len(window) - (end if self._include else begin)
        held = "".join(self._held)
        self._held = [held[: len(held) - surplus]]
        return stop

    def ready(self, finished: bool) -> str:
        """Text that was not given out before and can be now: it is no part of a stop string that may yet come."""
        self._catch_up()
        if finished and not self._ended:
            self._ended = True
            self._held.append(self._source.finish())
        text = "".join(self._held)
        back = 0 if self._ended or self._include else self._reach
        text, rest = text[: max(len(text) - back, 0)], text[max(len(text) - back, 0) :]
        self._held = [rest] if rest else []
        self._shown.write(text)
        return text

    @property
    def text(self) -> str:
        """All of it so far, cut at the stop string; parts of a character come with the rest of it, or at the end."""
        self._catch_up()
        return self._shown.getvalue() + "".join(self._held)

    def _catch_up(self) -> None:
        if self._waiting:
            self._held.append(self._source.feed(self._waiting))
            self._waiting = []
