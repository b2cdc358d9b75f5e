# SPDX-License-Identifier: Apache-2.0
"""What an engine counts, as plain numbers. Who exposes them, and how, is not known here."""

from dataclasses import dataclass, field


@dataclass(slots=True)
class Counters:
    """Only ever growing."""

    steps: int = 0
    prompt_tokens: int = 0  # of requests taken
    cached_tokens: int = 0  # of those, not computed for they were cached
    generated_tokens: int = 0
    requests: int = 0
    finished: dict[str, int] = field(default_factory=lambda: dict.fromkeys(("stop", "length", "abort", "error"), 0))


@dataclass(frozen=True, slots=True)
class EngineMetrics:
    """The counters, and how things stand."""

    running: int
    waiting: int
    free_blocks: int
    cached_blocks: int
    used_blocks: int
    kv_usage: float  # share of the blocks that are in use
    steps: int
    preemptions: int
    compiled_late: int  # programs that a step had to wait for; 0 but for an engine without warm-up
    requests: int
    finished: dict[str, int]
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    policy_version: int
