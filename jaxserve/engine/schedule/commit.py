# SPDX-License-Identifier: Apache-2.0
"""Applies a step's result to one sequence: its next token, finish reason, log probabilities, embedding."""

from collections.abc import Set

from jaxserve.engine.schedule.plan import Slice, StepResult
from jaxserve.engine.schedule.sequence import Sequence
from jaxserve.types.outputs import FinishReason, TokenLogprobs, Update


def applied(
    slice: Slice, result: StepResult, update: Update, *, first: int, last: int, ends_of_text: Set[int]
) -> FinishReason | None:
    """Apply the result of one slice, which has the entries from `first` to `last`; return whether it ends."""
    sequence = slice.sequence
    if slice.score_to > slice.score_from:
        update.prompt_logprobs = scores(slice, result, first)
        sequence.scores_reported = slice.score_to
    if slice.drafts:
        return checked(slice, result, first, update, ends_of_text)
    if slice.samples:
        return sampled(sequence, result, last, update, ends_of_text)
    if slice.embeds:
        update.embedding = embedding(slice, result, last)
        return None if update.embedding is None else "stop"
    if sequence.request.score_only and slice.start + slice.count == sequence.goal:
        return "length"
    return None


def sampled(
    sequence: Sequence, result: StepResult, entry: int, update: Update, ends_of_text: Set[int]
) -> FinishReason | None:
    """Append the token sampled in this row, unless the sequence is held; return whether the sequence ends."""
    params, token = sequence.request.params, result.tokens[entry]
    sequence.pending -= 1
    if params.logprobs is not None:
        update.logprobs = [*(update.logprobs or ()), token_logprobs(result, entry, params.logprobs)]
    tokens = sequence.tokens
    if sequence.held:
        sequence.reported = len(tokens)
        return None
    tokens.append(token)
    update.token_ids.append(token)
    length = len(tokens)
    if token in sequence.stops and length >= sequence.min_end:
        if params.ignore_eos or token not in ends_of_text:
            update.stop_reason = token
        return "stop"
    return "length" if length >= sequence.end else None


def counted(slice: Slice, result: StepResult, first: int) -> int:
    """How many of a slice's entries count: of one with drafts those that sampled its drafts, and the next. The devices
    stop at the same one."""
    right = 0
    while right < len(slice.drafts) and result.tokens[first + right] == slice.drafts[right]:
        right += 1
    return slice.entries - len(slice.drafts) + right


def checked(
    slice: Slice, result: StepResult, first: int, update: Update, ends_of_text: Set[int]
) -> FinishReason | None:
    """Append the tokens of a slice with drafts, and count drafts that were wrong as not computed; return whether the
    sequence ends, which drops the tokens after that."""
    sequence, count = slice.sequence, counted(slice, result, first)
    wrong = slice.entries - count
    sequence.computed -= wrong
    sequence.pending -= wrong
    sequence.unsure -= len(slice.drafts)
    for entry in range(first, first + count):
        if reason := sampled(sequence, result, entry, update, ends_of_text):
            return reason
    return None


def scores(slice: Slice, result: StepResult, first: int) -> list[TokenLogprobs]:
    """Log probabilities of the prompt tokens that the slice scores; its rows of logits start at `first`."""
    wanted = slice.sequence.request.params.prompt_logprobs or 0
    return [token_logprobs(result, first + i, wanted) for i in range(slice.score_to - slice.score_from)]


def embedding(slice: Slice, result: StepResult, last: int) -> bytes | None:
    """The hidden state to return; None while more tokens are to be computed for a mean."""
    if result.embeddings is None:
        raise RuntimeError("a row needs its hidden state, but the step returned none")
    states = result.embeddings[last + 1 - slice.embeds : last + 1]
    sequence, mean = slice.sequence, slice.sequence.mean
    if mean is not None:
        mean.add(states)
        if slice.start + slice.count < sequence.prompt_len:
            return None
        states = mean.value()[None]
    return states[-1].astype("<f4").tobytes()


def token_logprobs(result: StepResult, entry: int, wanted: int) -> TokenLogprobs:
    """Log probabilities with the `wanted` most likely tokens (-1: all). Other rows of the step may need more."""
    logprobs, ranks = result.logprobs, result.ranks
    if logprobs is None or ranks is None:
        raise RuntimeError("a row needs log probabilities, but the step computed none")
    tops: list[int] = []
    values: list[float] = []
    if wanted and result.top_tokens is not None and result.top_logprobs is not None:
        count = None if wanted < 0 else wanted
        tops, values = result.top_tokens[entry, :count].tolist(), result.top_logprobs[entry, :count].tolist()
        if tops and tops[-1] < 0:  # fewer exist
            count = tops.index(-1)
            tops, values = tops[:count], values[:count]
    return TokenLogprobs(result.tokens[entry], float(logprobs[entry]), int(ranks[entry]), tops, values)
