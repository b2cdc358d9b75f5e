# SPDX-License-Identifier: Apache-2.0
"""Beam search over an engine's held sequences, which sample nothing: each waits here to be told how to go on.

With vLLM's meaning: the 2 * width likeliest tokens of each beam are candidates; those that end the text complete a
beam, of the others the `width` best go on; at the end the best of all are returned. A beam's score is the sum of its
log-probabilities over length ** length_penalty, where the prompt counts as length and the end of text does not.

Beams share the blocks of what they have in common. A beam that goes on in several ways is branched, and who writes
first into a shared block gets a copy of it. Where memory is short, the scheduler has beams that wait here give up
their blocks, and computes them again when they go on.
"""

from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass

from jaxserve.engine.capacity import Limits
from jaxserve.engine.engine import Engine
from jaxserve.engine.schedule.sequence import Sequence
from jaxserve.errors import RequestError
from jaxserve.frontend.outputs import position_logprobs
from jaxserve.text.tokenizer import Tokenizer
from jaxserve.types.outputs import BeamSearchOutput, BeamSearchSequence, FinishReason, TokenLogprobs, Update
from jaxserve.types.request import Request
from jaxserve.types.sampling_params import BeamSearchParams, SamplingParams


@dataclass(frozen=True, slots=True)
class _Step:
    """One token of a beam. Beams are chains of these, and share them as far as they agree."""

    before: "_Step | None"
    token: int
    candidates: TokenLogprobs
    total: float  # of the log-probabilities so far
    count: int  # of the tokens so far

    def chain(self) -> "list[_Step]":
        steps: list[_Step] = []
        step: _Step | None = self
        while step is not None:
            steps.append(step)
            step = step.before
        return steps[::-1]


@dataclass(slots=True)
class _Beam:
    sequence: Sequence
    step: _Step | None
    candidates: TokenLogprobs | None = None  # for its next token, once the engine has told


class BeamSearch:
    """The beams of one prompt, from `start` until `output` is there."""

    def __init__(self, engine: Engine, request: Request, params: BeamSearchParams) -> None:
        self.id = request.id
        self.output: BeamSearchOutput | None = None
        self._engine, self._request, self._params = engine, request, params
        self._ends = frozenset[int]() if params.ignore_eos else engine.limits.eos_token_ids
        self._beams: dict[int, _Beam] = {}  # by the index of their sequence
        self._next_index = 1
        self._completed: list[_Step] = []

    @staticmethod
    def sampling_params(params: BeamSearchParams) -> SamplingParams:
        return SamplingParams(
            temperature=0, logprobs=2 * params.beam_width, max_tokens=params.max_tokens, detokenize=False
        )

    def start(self) -> None:
        self._engine.add(self._request, held=True)
        [sequence] = self._engine.scheduler.requests[self._request.id]
        self._beams[0] = _Beam(sequence, None)

    def take(self, update: Update, tokenizer: Tokenizer | None) -> None:
        """What the engine says of one beam. When it has spoken of all, they go on."""
        beam = self._beams.get(update.index)
        if beam is None or self.output is not None:
            return  # one that was given up
        if update.finish_reason is not None:
            self._finish([beam.step for beam in self._beams.values() if beam.step], tokenizer, update.finish_reason)
        elif update.logprobs:
            beam.candidates = update.logprobs[-1]
            if all(beam.candidates for beam in self._beams.values()):
                self._advance(tokenizer)

    def _advance(self, tokenizer: Tokenizer | None) -> None:
        found: list[tuple[_Step, int]] = []
        for index, beam in self._beams.items():
            for step in self._nexts(beam):
                if step.token in self._ends:
                    self._completed.append(step)
                else:
                    found.append((step, index))
        found.sort(key=lambda pair: self._score(pair[0]), reverse=True)
        kept = found[: self._params.beam_width]
        [some, *_] = self._beams.values()
        if not kept or len(some.sequence.tokens) + 1 == some.sequence.end:
            self._finish([step for step, _ in kept], tokenizer, "length")
        else:
            self._go_on(kept)

    def _nexts(self, beam: _Beam) -> Iterator[_Step]:
        candidates, last = beam.candidates, beam.step
        assert candidates is not None
        total, count = (last.total, last.count) if last else (0.0, 0)
        likeliest = zip(candidates.top_tokens, candidates.top_logprobs, strict=True)
        for (token, logprob), _ in zip(likeliest, range(2 * self._params.beam_width), strict=False):
            yield _Step(last, token, candidates, total + logprob, count + 1)

    def _go_on(self, kept: list[tuple[_Step, int]]) -> None:
        scheduler = self._engine.scheduler
        left = Counter(index for _, index in kept)
        for index in self._beams.keys() - left.keys():  # first, so that their rows and blocks are free
            scheduler.drop(self._beams[index].sequence)
        beams: dict[int, _Beam] = {}
        for step, index in kept:
            sequence = self._beams[index].sequence
            left[index] -= 1
            if left[index]:  # a twin; the last one goes on in its place
                sequence = scheduler.branch(sequence, self._next_index)
                self._next_index += 1
            scheduler.extend(sequence, step.token)
            beams[sequence.index] = _Beam(sequence, step)
        self._beams = beams

    def _score(self, step: _Step) -> float:
        length = len(self._request.prompt_token_ids) + step.count - (step.token in self._ends)
        return step.total / length**self._params.length_penalty

    def _finish(self, alive: list[_Step], tokenizer: Tokenizer | None, reason: FinishReason) -> None:
        best = sorted([*self._completed, *alive], key=self._score, reverse=True)[: self._params.beam_width]
        sequences = [self._sequence(step, tokenizer, reason) for step in best]
        if not sequences:  # a fault at the first token
            sequences = [BeamSearchSequence(list(self._request.prompt_token_ids), [], finish_reason=reason)]
        self.output = BeamSearchOutput(sequences)
        self._end(None if reason != "length" else sequences[0].finish_reason)

    def _end(self, reason: FinishReason | None) -> None:
        """In the engine's counts a search is one request that ended, by its best beam's reason; None: by a fault, which
        is counted already."""
        scheduler = self._engine.scheduler
        beams = list(scheduler.requests.get(self.id, ()))
        for sequence in beams[reason is not None :]:
            scheduler.drop(sequence)
        if reason is not None:
            self._engine.abort(self.id, reason=reason)

    def _sequence(self, step: _Step, tokenizer: Tokenizer | None, reason: FinishReason) -> BeamSearchSequence:
        steps, width = step.chain(), 2 * self._params.beam_width
        tokens = [*self._request.prompt_token_ids, *(each.token for each in steps)]
        ended = step.token in self._ends
        text = None
        if tokenizer is not None:
            shown = tokens[:-1] if ended and not self._params.include_stop_str_in_output else tokens
            text = tokenizer.decode(shown, skip_special_tokens=False)
        return BeamSearchSequence(
            tokens=tokens,
            logprobs=[position_logprobs(each.candidates, width, tokenizer) for each in steps],
            cum_logprob=step.total,
            text=text,
            finish_reason="stop" if ended else reason,
            stop_reason=step.token if ended else None,
        )


def check(params: BeamSearchParams, limits: Limits) -> None:
    """That the engine can tell as many candidates and run as many beams."""
    if not isinstance(params, BeamSearchParams):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise RequestError("params", f"params are of type {type(params).__name__}", "give BeamSearchParams")
    width = params.beam_width
    if 2 * width > limits.max_logprobs:
        problem = f"beam_width is {width}, and twice as many log-probabilities are above max_logprobs"
        raise RequestError("beam_width", f"{problem} {limits.max_logprobs}", "lower it, or raise max_logprobs")
    if width > limits.max_num_seqs:
        problem = f"beam_width is {width}, the engine runs {limits.max_num_seqs} sequences"
        raise RequestError("beam_width", problem, "lower it")


def search(
    engine: Engine, requests: list[Request], params: BeamSearchParams, tokenizer: Tokenizer | None
) -> Iterator[list[BeamSearch]]:
    """Runs all, as many at once as there are rows for; gives all of them after every step."""
    searches = [BeamSearch(engine, request, params) for request in requests]
    waiting = deque(searches)
    running: dict[str, BeamSearch] = {}
    while waiting or engine.unfinished:
        while waiting and (len(running) + 1) * params.beam_width <= engine.limits.max_num_seqs:
            one = waiting.popleft()
            one.start()
            running[one.id] = one
        for update in engine.step():
            one = running.get(update.request_id)
            if one is not None:
                one.take(update, tokenizer)
        running = {one.id: one for one in running.values() if one.output is None}
        yield searches
