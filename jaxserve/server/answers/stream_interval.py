# SPDX-License-Identifier: Apache-2.0
"""stream_interval: merges a stream's outputs into chunks of the number of tokens that the client sets."""

from dataclasses import replace

from jaxserve.types.outputs import CompletionOutput, RequestOutput


class Pace:
    """Decides what to send of a streamed answer. A sample's first and last tokens are sent immediately."""

    def __init__(self, interval: int) -> None:
        self._interval = interval
        self._held: dict[tuple[int, int], CompletionOutput] = {}
        self._begun: set[tuple[int, int]] = set()

    def due(self, place: int, output: RequestOutput) -> RequestOutput | None:
        if self._interval == 1:
            return output
        samples = [sample for each in output.outputs if (sample := self._sample(place, each)) is not None]
        return replace(output, outputs=samples) if samples else None

    def _sample(self, place: int, news: CompletionOutput) -> CompletionOutput | None:
        key = place, news.index
        held = self._held.pop(key, None)
        if held is not None:
            news = _joined(held, news)
        if key in self._begun and len(news.token_ids) < self._interval and not news.finished:
            self._held[key] = news
            return None
        self._begun.add(key)
        return news


def _joined(earlier: CompletionOutput, later: CompletionOutput) -> CompletionOutput:
    logprobs = None if later.logprobs is None else [*(earlier.logprobs or ()), *later.logprobs]
    ids = [*earlier.token_ids, *later.token_ids]
    return replace(later, text=earlier.text + later.text, token_ids=ids, logprobs=logprobs)
