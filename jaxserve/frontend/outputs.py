# SPDX-License-Identifier: Apache-2.0
"""Turns an engine's Updates into the RequestOutputs that users get: text, stop strings, log probabilities.

Runs in the process that has the tokenizer, wherever the engine is. An embedding is an output without text.

Every output is an immutable snapshot, because users keep them. So with CUMULATIVE an update copies the text and a
pointer per earlier token of its sample; DELTA and FINAL_ONLY copy nothing. Outputs share what no longer changes: the
prompt's lists, the dicts of log probabilities, samples without new tokens.
"""

from collections.abc import Sequence

import numpy as np

from jaxserve.errors import RequestError
from jaxserve.text.detokenizer import IncrementalDetokenizer
from jaxserve.text.tokenizer import Tokenizer
from jaxserve.types.outputs import (
    CompletionOutput,
    FinishReason,
    Logprob,
    PositionLogprobs,
    RequestOutput,
    TokenLogprobs,
    Update,
)
from jaxserve.types.request import Abort, Request
from jaxserve.types.sampling_params import RequestOutputKind, SamplingParams


class OutputBuilder:
    """Makes the outputs of one request.

    An output lists all n samples in order, or with DELTA only the one with new tokens.

    for update in updates:
        output = builder.add(update)  # None if there is nothing to show yet
        aborts += builder.take_aborts(update.request_id)  # for the engine
    """

    def __init__(self, tokenizer: Tokenizer | None, request: Request) -> None:
        params = request.params
        if tokenizer is None and params.stops:
            raise RequestError("stop", "stop strings need a tokenizer, but none is loaded", "use stop_token_ids")
        self._request = request
        self._prompt = request.prompt
        self._prompt_token_ids = request.prompt_ids
        self._kind = params.output_kind
        self._tokenizer = tokenizer if params.detokenize else None
        writer = self._tokenizer if request.generates else None
        self._samples = [_Sample(index, writer, params, self._prompt_token_ids) for index in range(params.n)]
        self._unfinished = params.n
        self._stopped: list[int] = []
        self._prompt_logprobs: list[PositionLogprobs | None] | None = None if params.prompt_logprobs is None else [None]
        self._num_cached_tokens = 0
        self._embedding: np.ndarray | None = None

    def add(self, update: Update) -> RequestOutput | None:
        """The output after this update, if any. Updates of a sample that has ended are ignored."""
        sample = self._samples[update.index]
        if sample.finish_reason is not None:
            return None
        if update.num_cached_tokens > self._num_cached_tokens:
            self._num_cached_tokens = update.num_cached_tokens
        if update.prompt_logprobs and self._prompt_logprobs is not None:
            # Make a new list, since an earlier output may hold the old one.
            self._prompt_logprobs = self._prompt_logprobs + self._prompt_positions(update.prompt_logprobs)
        if update.embedding is not None:
            self._embedding = np.frombuffer(update.embedding, "<f4").astype(np.float32)
        sample.add(update)
        if sample.finish_reason is not None:
            self._unfinished -= 1
            if update.finish_reason is None:
                self._stopped.append(update.index)
        if self._kind is RequestOutputKind.FINAL_ONLY:
            return self._output([each.whole() for each in self._samples]) if self.finished else None
        if not update.token_ids and update.finish_reason is None:
            return None
        if self._kind is RequestOutputKind.DELTA:
            output = self._output([sample.news()])
            self._prompt_logprobs = None if self._prompt_logprobs is None else []
            return output
        sample.renew()
        return self._output([each.shown for each in self._samples])

    def take_aborts(self, request_id: str) -> list[Abort]:
        """Aborts for the samples that reached a stop string since the last call. `request_id`: the engine's id of this
        request, which may differ from the user's."""
        if not self._stopped:
            return []
        stopped, self._stopped = self._stopped, []
        return [Abort(request_id, index, "stop") for index in stopped]

    @property
    def finished(self) -> bool:
        return self._unfinished == 0

    @property
    def generated(self) -> list[int]:
        """How many tokens each sample has so far, also those of outputs to come."""
        return [sample.count for sample in self._samples]

    @property
    def cached(self) -> int:
        """How many tokens of the prompt came from the prefix cache."""
        return self._num_cached_tokens

    def _output(self, outputs: list[CompletionOutput]) -> RequestOutput:
        return RequestOutput(  # by position, which takes half as long
            self._request.id,
            self._prompt,
            self._prompt_token_ids,
            outputs,
            self._unfinished == 0,
            self._prompt_logprobs,
            self._num_cached_tokens,
            self._embedding,
        )

    def _prompt_positions(self, tokens: Sequence[TokenLogprobs]) -> list[PositionLogprobs | None]:
        wanted = self._request.params.prompt_logprobs
        return [position_logprobs(token, wanted, self._tokenizer) for token in tokens]


class _Sample:
    """The state of one of the n samples."""

    def __init__(self, index: int, tokenizer: Tokenizer | None, params: SamplingParams, prompt: list[int]) -> None:
        self.index = index
        self.count = 0  # its tokens so far
        self.finish_reason: FinishReason | None = None
        self._tokenizer = tokenizer
        self._wanted = params.logprobs
        self._detokenizer: IncrementalDetokenizer | None = None
        if tokenizer is not None:
            self._detokenizer = IncrementalDetokenizer(tokenizer, prompt, params)
        self._stop_reason: int | str | None = None
        self._error: str | None = None
        self._policy_version = 0
        # With DELTA what was not returned yet, else all of it.
        self._token_ids: list[int] = []
        self._logprobs: list[PositionLogprobs] | None = None if self._wanted is None else []
        self._cumulative: float | None = None if self._wanted is None else 0.0
        self.shown = self._completion("", [], None if self._wanted is None else [])

    def add(self, update: Update) -> None:
        token_ids = update.token_ids
        self.finish_reason = update.finish_reason
        self._stop_reason = update.stop_reason
        self._error = update.error
        self._policy_version = update.policy_version
        if self._detokenizer is not None:
            before = self._detokenizer.token_count
            stop = self._detokenizer.append(token_ids, stopped=update.finish_reason == "stop")
            if stop is not None:
                self.finish_reason, self._stop_reason, self._error = "stop", stop, None
                token_ids = token_ids[: self._detokenizer.token_count - before]
        self._token_ids += token_ids
        self.count += len(token_ids)
        if self._logprobs is not None and update.logprobs is not None and self._cumulative is not None:
            for token in update.logprobs[: len(token_ids)]:
                self._logprobs.append(position_logprobs(token, self._wanted, self._tokenizer))
                self._cumulative += token.logprob

    def whole(self) -> CompletionOutput:
        """The whole sample, for the final output."""
        return self._completion(self._ready(), self._token_ids, self._logprobs)

    def news(self) -> CompletionOutput:
        """What was added since the last call."""
        output = self._completion(self._ready(), self._token_ids, self._logprobs)
        self._token_ids = []
        self._logprobs = None if self._logprobs is None else []
        return output

    def renew(self) -> None:
        """Set `shown` to a snapshot of the sample."""
        logprobs = None if self._logprobs is None else self._logprobs.copy()
        self.shown = self._completion(self.shown.text + self._ready(), self._token_ids.copy(), logprobs)

    def _ready(self) -> str:
        return "" if self._detokenizer is None else self._detokenizer.ready(self.finish_reason is not None)

    def _completion(self, text: str, token_ids: list[int], logprobs: list[PositionLogprobs] | None) -> CompletionOutput:
        return CompletionOutput(
            self.index,
            text,
            token_ids,
            self._cumulative,
            logprobs,
            self.finish_reason,
            self._stop_reason,
            self._error,
            self._policy_version,
        )


def position_logprobs(token: TokenLogprobs, wanted: int | None, tokenizer: Tokenizer | None) -> PositionLogprobs:
    """The chosen token first, then up to `wanted` of the most likely ones; -1 or None: all of them."""
    kept = len(token.top_tokens) if wanted is None or wanted < 0 else wanted

    def entry(other: int, logprob: float, rank: int) -> Logprob:
        return Logprob(logprob, rank, None if tokenizer is None else tokenizer.token_text(other))

    position = {token.token: entry(token.token, token.logprob, token.rank)}
    best = zip(token.top_tokens[:kept], token.top_logprobs, strict=False)
    for place, (other, logprob) in enumerate(best):
        if other != token.token:
            position[other] = entry(other, logprob, place + 1)
    return position
