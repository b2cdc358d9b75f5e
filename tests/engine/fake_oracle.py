# SPDX-License-Identifier: Apache-2.0
"""Computes the results that a fake engine must give from the request alone; masks and drafts that depend on it."""

import random
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import numpy as np

from jaxserve.engine.capacity import Limits
from jaxserve.engine.schedule.masks import Words
from jaxserve.engine.schedule.packing import Ints
from jaxserve.engine.schedule.sequence import stops_of
from jaxserve.sampling import control_row
from jaxserve.types.outputs import FinishReason, TokenLogprobs, Update
from jaxserve.types.request import Request
from tests.engine.made_up_model import (
    VOCAB,
    Digests,
    advanced,
    digest,
    draw,
    embedded,
    first_seen,
    likelihood,
    pick,
    way,
)


@dataclass
class Answer:
    """All results of a sample, actual or expected."""

    tokens: list[int] = field(default_factory=list[int])
    reason: FinishReason | None = None
    stop_reason: int | str | None = None
    error: str | None = None
    logprobs: list[TokenLogprobs] = field(default_factory=list[TokenLogprobs])
    embedding: bytes | None = None
    scheduled: float | None = None
    reported: bool = False  # of anything

    def take(self, update: Update) -> None:
        assert self.reason is None, f"news after the end: {update}"
        self.tokens += update.token_ids
        self.logprobs += update.logprobs or []
        self.embedding = update.embedding
        if self.reported:
            assert update.scheduled is None, "reported again when it got its row"
        else:
            self.scheduled, self.reported = update.scheduled, True
        self.reason, self.stop_reason, self.error = update.finish_reason, update.stop_reason, update.error


def codes_of(request: Request, output: list[int]) -> Counter[int]:
    """What the penalties of a request count."""
    params, codes = request.params, Counter[int]()
    if params.penalized:
        codes.update({token: 2 * count for token, count in Counter(output).items()})
    if params.repetition_penalty != 1:
        codes.update(dict.fromkeys(request.prompt_token_ids, 1))
    return codes


class Oracle:
    """Generate one token after the other from the whole history."""

    def __init__(self, limits: Limits, masked: Collection[str] = ()) -> None:
        """`masked`: ids of requests whose tokens are ByLast's."""
        self.limits, self.masked = limits, masked

    def _seen(self, tokens: list[int], position: int) -> tuple[Ints, Digests]:
        array, windows = np.array(tokens, np.int32), self.limits.windows

        def attended(p: int) -> Ints:
            return np.concatenate([array[first_seen(window, p) : p + 1] for window in windows])

        digests = np.array([digest(attended(p)) for p in range(position + 1)], np.int64)
        kept = [digests[first_seen(window, position) :] for window in windows]
        if self.limits.states:
            kept.append(np.array([reduce(advanced, tokens[: position + 1], 0)], np.int64))
        return attended(position), np.concatenate(kept)

    def reported(self, tokens: list[int], token: int, wanted: int) -> TokenLogprobs:
        """The log probability of the token that follows these."""
        drawn = draw(*self._seen(tokens, len(tokens) - 1), b"")
        logprob, rank, top_tokens, top_logprobs = likelihood(drawn, token)
        return TokenLogprobs(token, logprob, rank, top_tokens[:wanted], top_logprobs[:wanted])

    def prompt_logprobs(self, request: Request) -> list[TokenLogprobs]:
        prompt, wanted = list(request.prompt_token_ids), request.params.prompt_logprobs
        return [] if wanted is None else [self.reported(prompt[:i], prompt[i], wanted) for i in range(1, len(prompt))]

    def following(self, request: Request, index: int, tokens: list[int]) -> int:
        """The token that a sample has after these."""
        params, output = request.params, tokens[len(request.prompt_token_ids) :]
        controlled = params.min_tokens > 0 or params.penalized or request.id in self.masked
        seed = ((params.seed or 0) % 2**32 ^ (params.seed or 0) >> 32) + index
        floats = np.array([params.temperature, params.top_p, params.min_p], np.float32).view(np.int32).tolist()
        numbers = [int(controlled), (seed + 2**31) % 2**32 - 2**31, *floats[:2], params.top_k, floats[2]]
        recent = output[-control_row.RECENT_TOKENS :] if controlled else []
        masked = stops_of(request, self.limits) if len(output) < params.min_tokens else frozenset[int]()
        if request.id in self.masked:
            masked |= forbidden(output)
        drawn = draw(*self._seen(tokens, len(tokens) - 1), way(len(tokens), numbers, recent, codes_of(request, output)))
        return pick(drawn, self.limits.vocab_size, masked)

    def answer(self, request: Request, index: int) -> Answer:
        params, prompt, limits = request.params, list(request.prompt_token_ids), self.limits
        answer = Answer()
        if request.score_only:
            answer.reason = "length"
            return answer
        if request.embed:
            states = [embedded(draw(*self._seen(prompt, at), b"")) for at in range(len(prompt))]
            found = {
                "first": states[0],
                "last": states[-1],
                "mean": np.average(states, axis=0),
                "weighted_mean": np.average(states, axis=0, weights=np.arange(len(prompt)) + 1),
            }
            answer.reason, answer.embedding = "stop", np.array(found[request.pool], "<f4").tobytes()
            return answer
        stops = stops_of(request, limits)
        tokens = list(prompt)
        while answer.reason is None:
            token = self.following(request, index, tokens)
            if params.logprobs is not None:
                answer.logprobs.append(self.reported(tokens, token, params.logprobs))
            tokens.append(token)
            answer.tokens.append(token)
            if token in stops and len(answer.tokens) >= params.min_tokens:
                answer.reason = "stop"
                plain = token in limits.eos_token_ids and not params.ignore_eos
                answer.stop_reason = None if plain else token
            elif len(answer.tokens) == params.max_tokens or len(tokens) == limits.max_model_len:
                answer.reason = "length"
        return answer


# --- masks ------------------------------------------------------------------------------------------------------------


def forbidden(output: list[int]) -> frozenset[int]:
    """A third of the tokens, which depends on the last one and on how many there are."""
    last = output[-1] if output else 1
    return frozenset(token for token in range(VOCAB) if (token + last + len(output)) % 3 == 0)


class ByLast:
    def allowed(self, output: list[int]) -> Words:
        bits = np.zeros(32 * control_row.mask_words(VOCAB), np.bool_)
        bits[[token for token in range(VOCAB) if token not in forbidden(output)]] = True
        return np.packbits(bits, bitorder="little").view(np.int32)


# --- drafts -----------------------------------------------------------------------------------------------------------


GUESSES = ("right", "wrong", "mixed", "too long", "no tokens", "no list", "fault")


class Guesses:
    """Proposes what a request's first sample goes on with, more or less, also beyond its end."""

    def __init__(self, oracle: Oracle, request: Request, kind: str) -> None:
        self.oracle, self.request, self.kind = oracle, request, kind

    def propose(self, tokens: list[int]) -> list[int]:
        kind, length = self.kind, len(tokens)
        draws = random.Random(length)
        right = list(tokens)
        while len(right) < length + draws.randrange(1, 7):
            right.append(self.oracle.following(self.request, 0, right))
        right = right[length:]
        proposed: dict[str, Any] = {
            "right": right,
            "wrong": [(token + 1) % VOCAB for token in right],
            "mixed": [token if draws.random() < 0.8 else 5 for token in right],
            "too long": right + [5] * 1000,
            "no tokens": [*right, draws.choice([VOCAB, -1, 2**70, "5", 5.0, None]), *right],
            "no list": draws.choice([right, None, 5]),
            "fault": right,
        }
        if kind == "fault" and draws.random() < 0.2:
            raise ZeroDivisionError("no draft")
        return proposed[kind]
