# SPDX-License-Identifier: Apache-2.0
"""An engine's counters and gauges as plain numbers, independent of how they are exposed."""

from bisect import bisect_left
from collections import deque
from dataclasses import dataclass, field

# Histogram bounds for tokens per step; one more bucket counts larger steps.
STEP_TOKENS = (1, 8, *(1 << power for power in range(4, 15)))


@dataclass(slots=True)
class Counters:
    """Monotonic counters."""

    steps: int = 0
    step_tokens: list[int] = field(default_factory=lambda: [0] * (len(STEP_TOKENS) + 1))  # steps per bucket
    computed_tokens: int = 0  # by all steps
    prompt_tokens: int = 0  # of accepted requests
    cached_tokens: int = 0  # prompt tokens served from the prefix cache
    generated_tokens: int = 0
    requests: int = 0
    finished: dict[str, int] = field(default_factory=lambda: dict.fromkeys(("stop", "length", "abort", "error"), 0))

    def count_step(self, tokens: int) -> None:
        self.steps += 1
        self.step_tokens[bisect_left(STEP_TOKENS, tokens)] += 1
        self.computed_tokens += tokens


class StepClock:
    """How long steps take, by their number of tokens: from the launch, or the end of the step before, to the result."""

    RISE, FALL = 0.1, 0.5  # weights of a new value: a step may have waited for a compiler, none is too fast

    def __init__(self) -> None:
        self.seconds = [0.0] * (len(STEP_TOKENS) + 1)  # per bucket; 0: not measured
        self._launched: deque[float] = deque()  # of steps in flight
        self._last = 0.0  # when the last result was read

    def launch(self, now: float) -> None:
        self._launched.append(now)

    def read(self, tokens: int, now: float) -> None:
        seconds = now - max(self._launched.popleft(), self._last)
        self._last = now
        bucket = bisect_left(STEP_TOKENS, tokens)
        known = self.seconds[bucket]
        weight = 1 if not known else self.RISE if seconds > known else self.FALL
        self.seconds[bucket] += weight * (seconds - known)


@dataclass(frozen=True, slots=True)
class EngineMetrics:
    """A snapshot of the counters and the engine's state."""

    running: int
    waiting: int
    free_blocks: int
    cached_blocks: int
    used_blocks: int
    kv_usage: float  # fraction of the blocks in use
    steps: int
    preemptions: int
    compiled_late: int  # programs that a step had to wait for; 0 unless warmup is "none"
    requests: int
    finished: dict[str, int]
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    policy_version: int
    prefix_queries: int  # prompt tokens looked up in the prefix cache
    prefix_hits: int  # prompt tokens found in it
    step_tokens: list[int]  # histogram of tokens per step, with the bounds STEP_TOKENS
    computed_tokens: int  # tokens computed by all steps
    programs_compiled: int = 0
    programs_pending: int = 0  # still to be compiled in the background
    step_seconds: list[float] = field(
        default_factory=list[float]
    )  # duration of a step, by the same buckets; 0: unknown
