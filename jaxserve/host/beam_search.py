# SPDX-License-Identifier: Apache-2.0
"""Beam search on an engine: its sequences are held after each token, and the search branches, extends and drops them.

Same semantics as vLLM: the 2 * width most likely tokens of each beam are candidates; those that end the text complete a
beam, and the `width` best of the others continue; at the end the best of all are returned. A beam's score is the sum of
its log probabilities over length ** length_penalty, where the length includes the prompt but not the end of text.

Beams share the KV blocks of their common prefix. A beam that continues in several ways is branched, and the first to
write into a shared block gets a copy of it. When memory is short, the scheduler preempts waiting beams and recomputes
them when they continue.

The result has only ids and log probabilities; the frontend, which has the tokenizer, makes the text.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from jaxserve.types.outputs import FinishReason, TokenLogprobs, Update
from jaxserve.types.request import Request
from jaxserve.types.sampling_params import BeamSearchParams, SamplingParams

if TYPE_CHECKING:  # it imports jax, see driver.py
    from jaxserve.engine.engine import Engine


@dataclass(frozen=True, slots=True)
class _Step:
    """One token of a beam. A beam is a chain of steps; beams with a common prefix share its steps."""

    before: "_Step | None"
    token: int
    logprob: float
    rank: int
    candidates: TokenLogprobs
    total: float  # the sum of the log probabilities so far
    count: int  # the number of tokens so far

    def chain(self) -> "list[_Step]":
        steps: list[_Step] = []
        step: _Step | None = self
        while step is not None:
            steps.append(step)
            step = step.before
        return steps[::-1]

    def chosen(self) -> TokenLogprobs:
        tops = self.candidates
        return TokenLogprobs(self.token, self.logprob, self.rank, tops.top_tokens, tops.top_logprobs)


@dataclass(slots=True)
class _Beam:
    step: _Step | None = None
    candidates: TokenLogprobs | None = None  # for its next token, once the engine has computed them


class BeamSearch:
    """The beams of one request, from `start` until `take` returns the result."""

    def __init__(self, engine: "Engine", request: Request, params: BeamSearchParams) -> None:
        self._engine, self._request, self._params = engine, request, params
        self._width = params.beam_width
        self._ends = frozenset[int]() if params.ignore_eos else engine.limits.eos_token_ids
        self._most = min(params.max_tokens, engine.limits.max_model_len - len(request.prompt_token_ids))
        self._beams: dict[int, _Beam] = {0: _Beam()}  # by the index of their sequence
        self._next_index = 1
        self._completed: list[_Step] = []
        self._result: list[_Step] | None = None  # the chosen beams, returned with the engine's last update
        self._first: Update | None = None

    def start(self) -> None:
        wanted = self._request.params.logprobs
        logprobs = -1 if wanted == -1 else max(2 * self._width, wanted or 0)
        params = SamplingParams(temperature=0, logprobs=logprobs, max_tokens=self._params.max_tokens, detokenize=False)
        self._engine.add(replace(self._request, params=params), hold=self._width)

    def take(self, update: Update) -> list[Update]:
        """Take one update of the engine. Beams continue once it has computed the candidates of all beams.

        Returns an empty list until the search ends, then an update for each of the best beams, best first.
        """
        if self._first is None:
            self._first = update
        if update.finish_reason is not None:
            return self._end(update, update.finish_reason)
        beam = self._beams.get(update.index)
        if beam is not None and update.logprobs and self._result is None:
            beam.candidates = update.logprobs[-1]
            if all(beam.candidates for beam in self._beams.values()):
                self._advance()
        return []

    def _advance(self) -> None:
        found: list[tuple[_Step, int]] = []
        for index, beam in self._beams.items():
            for step in self._nexts(beam):
                if step.token in self._ends:
                    self._completed.append(step)
                else:
                    found.append((step, index))
        found.sort(key=lambda pair: self._score(pair[0]), reverse=True)
        kept = found[: self._width]
        if not kept or kept[0][0].count == self._most:
            self._result = self._best([step for step, _ in kept])
            self._engine.abort(self._request.id, reason="stop" if self._ended(self._result[0]) else "length")
        else:
            self._continue(kept)

    def _nexts(self, beam: _Beam) -> Iterator[_Step]:
        candidates, last = beam.candidates, beam.step
        assert candidates is not None
        total, count = (last.total, last.count) if last else (0.0, 0)
        likeliest = zip(candidates.top_tokens, candidates.top_logprobs, strict=True)
        for (token, logprob), place in zip(likeliest, range(2 * self._width), strict=False):
            yield _Step(last, token, logprob, place + 1, candidates, total + logprob, count + 1)

    def _continue(self, kept: list[tuple[_Step, int]]) -> None:
        engine, request_id = self._engine, self._request.id
        left = Counter(index for _, index in kept)
        for index in self._beams.keys() - left.keys():  # drop these first, to free their rows and blocks
            engine.drop(request_id, index)
        beams: dict[int, _Beam] = {}
        for step, index in kept:
            parent, left[index] = index, left[index] - 1
            if left[parent]:  # a branch; the last one continues in the parent's place
                index, self._next_index = self._next_index, self._next_index + 1
                engine.branch(request_id, parent, index)
            engine.extend(request_id, index, step.token)
            beams[index] = _Beam(step)
        self._beams = beams

    def _score(self, step: _Step) -> float:
        length = len(self._request.prompt_token_ids) + step.count - self._ended(step)
        return step.total / length**self._params.length_penalty

    def _ended(self, step: _Step) -> bool:
        return step.token in self._ends

    def _best(self, alive: list[_Step]) -> list[_Step]:
        return sorted([*self._completed, *alive], key=self._score, reverse=True)[: self._width]

    def _end(self, update: Update, reason: FinishReason) -> list[Update]:
        """The result: the chosen beams, or the best so far if a fault, an abort or a deadline ended the search."""
        whole = self._result is not None
        best = self._result
        if best is None:
            self._engine.drop(self._request.id)  # after a fault in one beam, drop the others
            best = self._best([beam.step for beam in self._beams.values() if beam.step])
        results = [self._update(step) for step in best]
        # If the search ended before its first token there are fewer beams than samples: end each of these too.
        results += [Update(request_id=self._request.id, index=0) for _ in range(self._width - len(best))]
        for index, result in enumerate(results):
            result.index = index
            if whole and index < len(best):
                result.finish_reason = "stop" if self._ended(best[index]) else "length"
            else:
                result.finish_reason, result.error = reason, update.error
            result.policy_version = update.policy_version
            if self._first is not None:
                result.num_cached_tokens, result.scheduled = self._first.num_cached_tokens, self._first.scheduled
        return results

    def _update(self, step: _Step) -> Update:
        steps = step.chain()
        wanted = self._request.params.logprobs is not None
        return Update(
            request_id=self._request.id,
            index=0,
            token_ids=[each.token for each in steps],
            logprobs=[each.chosen() for each in steps] if wanted else None,
            stop_reason=step.token if self._ended(step) else None,
        )
