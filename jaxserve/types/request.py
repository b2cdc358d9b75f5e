# SPDX-License-Identifier: Apache-2.0
"""What goes into an engine: a request, which is a tokenized prompt with its parameters; and its abort."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import msgspec

from jaxserve.types.outputs import FinishReason
from jaxserve.types.sampling_params import BeamSearchParams, SamplingParams

type Pool = Literal["last", "first", "mean", "weighted_mean"]
"""The hidden states that an embedding is made of: the last token's, the first token's, or the mean of all; weighted by
position, later tokens count more."""

POOLS: tuple[Pool, ...] = get_args(Pool.__value__)


class Span(msgspec.Struct, array_like=True, frozen=True):
    """Prompt tokens whose ids do not determine their content, such as placeholders of an image."""

    start: int
    stop: int
    content: bytes  # a digest

    def within(self, start: int, stop: int) -> tuple[int | bytes, ...]:
        """Its part of the cache key of the tokens from `start` to `stop`."""
        return (self.start, self.stop, self.content) if self.start < stop and start < self.stop else ()


@dataclass(frozen=True, kw_only=True)
class Request:
    """A tokenized prompt and its parameters. `prompt_token_ids` and `bad_word_ids` are within the engine's limits."""

    id: str
    prompt_token_ids: Sequence[int]  # once prepared, an int32 array: cheap to check and to send
    params: SamplingParams = field(default_factory=SamplingParams)
    bad_word_ids: tuple[tuple[int, ...], ...] = ()  # params.bad_words as ids
    priority: int = 0  # lower runs first under the "priority" policy
    spans: tuple[Span, ...] = ()
    cache_salt: str | None = None  # requests share cached prompts only with those of the same salt
    tenant: str = ""  # whose request it is: tenants take turns
    arrival: float = field(default_factory=time.monotonic)
    deadline: float | None = None  # on the monotonic clock
    score_only: bool = False  # generate nothing; return only the prompt's log probabilities
    embed: bool = False  # generate nothing; return only a hidden state
    pool: Pool = "last"  # which one, if `embed`
    # If set, the samples are the best beams of such a search; `params` has their number and what outputs contain.
    beam_search: BeamSearchParams | None = None
    prompt: str | None = None  # the text, for outputs; the engine gets only the ids

    @property
    def prompt_ids(self) -> list[int]:
        """The prompt's ids as plain ints."""
        tolist: Callable[[], list[int]] | None = getattr(self.prompt_token_ids, "tolist", None)
        return list(map(int, self.prompt_token_ids)) if tolist is None else tolist()

    @property
    def generates(self) -> bool:
        return not (self.score_only or self.embed)

    @property
    def averages(self) -> bool:
        """Whether the hidden states of all tokens are needed."""
        return self.embed and self.pool in ("mean", "weighted_mean")


class Abort(msgspec.Struct, array_like=True, frozen=True, tag="abort"):
    """Ends a request, or one of its samples."""

    request_id: str
    index: int | None = None
    reason: FinishReason = "abort"
