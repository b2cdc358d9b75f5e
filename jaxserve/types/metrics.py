# SPDX-License-Identifier: Apache-2.0
"""What an engine counts, as plain numbers, independent of how they are exported."""

from bisect import bisect_left
from dataclasses import dataclass, field

# Tokens in a step: the upper bounds of the histogram's buckets; one more bucket is for those above.
STEP_TOKENS = (1, 8, *(1 << power for power in range(4, 15)))


@dataclass(slots=True)
class Counters:
    """Totals since the start."""

    steps: int = 0
    step_tokens: list[int] = field(default_factory=lambda: [0] * (len(STEP_TOKENS) + 1))  # steps in each class
    computed_tokens: int = 0  # by all steps
    prompt_tokens: int = 0  # of requests taken
    cached_tokens: int = 0  # prompt tokens served from the prefix cache
    generated_tokens: int = 0
    requests: int = 0
    finished: dict[str, int] = field(default_factory=lambda: dict.fromkeys(("stop", "length", "abort", "error"), 0))

    def count_step(self, tokens: int) -> None:
        self.steps += 1
        self.step_tokens[bisect_left(STEP_TOKENS, tokens)] += 1
        self.computed_tokens += tokens


@dataclass(frozen=True, slots=True)
class EngineMetrics:
    """The counters and the current state."""

    running: int
    waiting: int
    free_blocks: int
    cached_blocks: int
    used_blocks: int
    kv_usage: float  # share of the blocks that are in use
    steps: int
    preemptions: int
    compiled_late: int  # programs that a step had to wait for; always 0 with warm-up
    requests: int
    finished: dict[str, int]
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    policy_version: int
    prefix_queries: int  # prompt tokens looked up in the prefix cache
    prefix_hits: int  # of those, found
    step_tokens: list[int]  # how many steps computed how many tokens, by the classes of STEP_TOKENS
    computed_tokens: int  # their sum
