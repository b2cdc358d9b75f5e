# SPDX-License-Identifier: Apache-2.0
"""Owns the types of what an engine returns: updates, outputs and their parts.

Update         the result of one step for one sample of a request
RequestOutput  what users see: text, tokens and log probabilities of all samples so far
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import msgspec

if TYPE_CHECKING:  # `from jaxserve import RequestOutput` imports neither numpy nor jax
    import numpy as np

type FinishReason = Literal["stop", "length", "abort", "error"]


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """A token's log probability, and the most likely tokens at its position, best first."""

    token: int
    logprob: float
    rank: int
    top_tokens: list[int]
    top_logprobs: list[float]


class Update(msgspec.Struct, array_like=True, kw_only=True):
    """The result of one step for one sample. A sample's last update has a finish_reason."""

    request_id: str
    index: int  # of the sample, 0 to n - 1
    token_ids: list[int] = []
    logprobs: list[TokenLogprobs] | None = None  # of token_ids
    prompt_logprobs: list[TokenLogprobs] | None = None  # the next prompt tokens', starting with the second token
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None  # the stop token, unless it is the model's EOS
    error: str | None = None  # the reason for finish_reason "error" or "abort"
    num_cached_tokens: int = 0
    policy_version: int = 0  # of the weights
    embedding: bytes | None = None  # float32, little endian; in the last update of an embedding request
    scheduled: float | None = None  # in a sample's first update: when it got a row, on the monotonic clock


@dataclass(frozen=True, slots=True)
class Logprob:
    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


type PositionLogprobs = dict[int, Logprob]


@dataclass(slots=True)
class CompletionOutput:
    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[PositionLogprobs] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    error: str | None = None
    policy_version: int = 0

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass(slots=True)
class RequestOutput:
    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    prompt_logprobs: list[PositionLogprobs | None] | None = None  # None for the first token
    num_cached_tokens: int = 0
    embedding: "np.ndarray | None" = None  # float32 [hidden], of an embedding request


@dataclass(slots=True)
class ClassificationOutput:
    label: str  # the most probable
    probs: "np.ndarray"  # float32 [labels]


@dataclass(slots=True)
class BeamSearchSequence:
    tokens: list[int]  # prompt and generated tokens
    logprobs: list[PositionLogprobs]
    cum_logprob: float = 0.0
    text: str | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None


@dataclass(slots=True)
class BeamSearchOutput:
    sequences: list[BeamSearchSequence]
