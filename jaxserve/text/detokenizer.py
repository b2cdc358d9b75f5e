# SPDX-License-Identifier: Apache-2.0
"""Incremental detokenization of a sample, with stop strings."""

import io
from collections.abc import Sequence

from jaxserve.text.tokenizer import Tokenizer
from jaxserve.types.sampling_params import SamplingParams

MOST_WAITING = 1024  # tokens that are decoded together


class IncrementalDetokenizer:
    """Converts one sample's tokens to text as they arrive, and ends it at a stop string.

    If several stop strings end within the text of one token, the one that ends first wins, then the one that begins
    first. Matches completed within the first `min_tokens` tokens are ignored. Tokens are decoded lazily, a
    limited number at once: the thread that decodes a long answer serves other answers too.
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
        self._reach = max(map(len, self._stops), default=1) - 1  # how far back a stop string can begin
        self._end = ""  # the last `_reach` characters
        self._waiting: list[int] = []  # tokens not yet decoded
        self._shown = io.StringIO()  # text already returned
        self._held: list[str] = []  # text not yet returned
        self._ended = False
        self.token_count = 0  # tokens that belong to the output

    def append(self, ids: Sequence[int], *, stopped: bool = False) -> str | None:
        """Add tokens; return the stop string that they complete, if any. Later text is dropped.

        stopped: the last one is a stop token, which is shown only with include_stop_str_in_output.
        """
        if self._ended:
            return None
        shown = ids[:-1] if stopped and not self._include else ids
        if not self._stops:
            self._waiting += shown
            self.token_count += len(ids)
            if len(self._waiting) >= MOST_WAITING:
                self._catch_up()
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
        """Add the text of token `count`; if it completes a stop string, cut there."""
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
        """New text that is safe to return: it cannot be part of a stop string that may still complete."""
        if not (self._stops or finished or self._held):  # most texts: nothing is held back
            text = self._source.feed(self._waiting) if self._waiting else ""
            self._waiting = []
            self._shown.write(text)
            return text
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
        """All text so far, cut at the stop string. An incomplete character appears when it completes, or at the end."""
        self._catch_up()
        return self._shown.getvalue() + "".join(self._held)

    def _catch_up(self) -> None:
        if self._waiting:
            self._held.append(self._source.feed(self._waiting))
            self._waiting = []
