# SPDX-License-Identifier: Apache-2.0
"""Log probabilities in OpenAI's shapes for completions and for chats, and in vLLM's shape for prompts.

Token texts and offsets are computed from the tokens, never from the answer's text.
"""

from collections.abc import Sequence
from typing import Any

from jaxserve.text.tokenizer import Tokenizer
from jaxserve.types.outputs import Logprob, PositionLogprobs

LEAST = -9999.0  # JSON has no infinity


class TokenNames:
    """The text of tokens in an answer: their own, or `token_id:N`."""

    def __init__(self, tokenizer: Tokenizer | None, *, as_ids: bool) -> None:
        self.tokenizer = tokenizer
        self._as_ids = as_ids or tokenizer is None

    def __call__(self, token: int) -> str:
        if self._as_ids or self.tokenizer is None:
            return f"token_id:{token}"
        return self.tokenizer.token_text(token)

    def bytes_of(self, token: int) -> list[int] | None:
        """The UTF-8 bytes of its text, which may be only part of a character; None if unknown."""
        found = None if self.tokenizer is None else self.tokenizer.token_bytes(token)
        return None if found is None else list(found)


class CompletionLogprobs:
    """The log probabilities of one choice, added as its tokens arrive."""

    def __init__(
        self, names: TokenNames, wanted: int, *, after: Sequence[int], skip_special_tokens: bool, spaces: bool
    ) -> None:
        """`after`: the preceding tokens, which the first token's text may depend on."""
        self._names, self._wanted = names, wanted
        self._offset = 0  # the next token's offset in the text
        self._stream = None
        if names.tokenizer is not None:
            self._stream = names.tokenizer.stream(
                after, skip_special_tokens=skip_special_tokens, spaces_between_special_tokens=spaces
            )

    def add(self, ids: Sequence[int], positions: Sequence[PositionLogprobs | None]) -> dict[str, Any]:
        """The next tokens in OpenAI's shape."""
        names = self._names
        offsets, chances, tops = list[int](), list[float | None](), list[dict[str, float] | None]()
        for token, position in zip(ids, positions, strict=False):
            offsets.append(self._offset)
            if self._stream is not None:
                self._offset += len(self._stream.feed((token,)))
            chances.append(None if position is None else finite(position[token].logprob))
            tops.append(None if position is None else self._top(token, position))
        tokens = [names(token) for token in ids[: len(offsets)]]
        return {"text_offset": offsets, "token_logprobs": chances, "tokens": tokens, "top_logprobs": tops}

    def _top(self, token: int, position: PositionLogprobs) -> dict[str, float]:
        """The most likely tokens and the chosen one. Of tokens with the same text, the most likely is kept."""
        top: dict[str, float] = {}
        for other, entry in sorted(position.items(), key=_rank):
            if other == token or (entry.rank or 0) <= self._wanted:
                top.setdefault(self._names(other), finite(entry.logprob))
        return top


def chat_logprobs(
    names: TokenNames, wanted: int, ids: Sequence[int], positions: Sequence[PositionLogprobs]
) -> dict[str, Any]:
    """OpenAI's shape for chats. `wanted`: how many of the most likely tokens; -1: all that are available."""
    content: list[dict[str, Any]] = []
    for token, position in zip(ids, positions, strict=False):
        ranked = sorted(position.items(), key=_rank)
        best = ranked if wanted < 0 else [item for item in ranked if (item[1].rank or 0) <= wanted][:wanted]
        top = [_entry(names, other, entry) for other, entry in best]
        content.append({**_entry(names, token, position[token]), "top_logprobs": top})
    return {"content": content, "refusal": None}


def _entry(names: TokenNames, token: int, entry: Logprob) -> dict[str, Any]:
    return {"token": names(token), "logprob": finite(entry.logprob), "bytes": names.bytes_of(token)}


def prompt_logprobs(
    names: TokenNames, positions: Sequence[PositionLogprobs | None] | None
) -> list[dict[str, Any] | None] | None:
    """vLLM's shape for prompts: by token id, with ranks; null for the first token."""
    if positions is None:
        return None
    return [None if position is None else _by_id(names, position) for position in positions]


def _by_id(names: TokenNames, position: PositionLogprobs) -> dict[str, Any]:
    return {
        str(token): {"logprob": finite(entry.logprob), "rank": entry.rank, "decoded_token": names(token)}
        for token, entry in position.items()
    }


def _rank(item: tuple[int, Logprob]) -> int:
    return item[1].rank or 0


def finite(logprob: float) -> float:
    return logprob if logprob > LEAST else LEAST
