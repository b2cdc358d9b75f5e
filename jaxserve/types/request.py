# SPDX-License-Identifier: Apache-2.0
"""A tokenized prompt with its parameters, as an engine takes it."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from jaxserve.types.sampling_params import SamplingParams


@dataclass(frozen=True, kw_only=True)
class Request:
    """A prompt as ids. `prompt_token_ids` and the ids in `bad_word_ids` are checked when it meets an engine."""

    id: str
    prompt_token_ids: Sequence[int]
    params: SamplingParams = field(default_factory=SamplingParams)
    bad_word_ids: tuple[tuple[int, ...], ...] = ()  # params.bad_words as ids
    priority: int = 0  # lower goes first, where the policy is "priority"
    cache_salt: str | None = None  # requests share cached prompts only with those of the same salt
    arrival: float = field(default_factory=time.monotonic)
    deadline: float | None = None  # on the monotonic clock
    score_only: bool = False  # nothing is generated: the prompt's log-probabilities are all that is wanted
    embed: bool = False  # nothing is generated: the last token's hidden state is all that is wanted

    @property
    def generates(self) -> bool:
        return not (self.score_only or self.embed)
