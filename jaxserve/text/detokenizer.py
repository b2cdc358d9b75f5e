# SPDX-License-Identifier: Apache-2.0
"""The text of a sample while its tokens arrive, and where a stop string ends it."""

import io
from collections.abc import Sequence

from jaxserve.text.tokenizer import Tokenizer
from jaxserve.types.sampling_params import SamplingParams


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
