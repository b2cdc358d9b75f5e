# SPDX-License-Identifier: Apache-2.0
"""The plan of one step and its result, as plain host data."""

from dataclasses import dataclass, field

import numpy as np

from jaxserve.engine.schedule.need import MASK
from jaxserve.engine.schedule.sequence import Sequence


class Slice:
    """`count` tokens of a sequence from `start` on, and what is needed from their logits."""

    __slots__ = (
        "count",
        "drafts",
        "embeds",
        "epoch",
        "parent",
        "samples",
        "score_from",
        "score_to",
        "sequence",
        "start",
    )

    def __init__(self, sequence: Sequence, start: int, count: int, samples: int) -> None:
        self.sequence, self.epoch = sequence, sequence.epoch
        self.start, self.count = start, count
        self.samples = samples  # the number of tokens to sample: one, or with drafts one after each and one before
        self.drafts: list[int] | tuple[()] = ()  # guesses; the last of its tokens
        self.embeds = 0  # return the hidden states of so many tokens, the last ones
        self.score_from = self.score_to = 0  # prompt tokens to score, with the logits of their predecessors
        self.parent: Slice | None = None  # a fork: samples from the parent's logits and computes nothing

    @property
    def entries(self) -> int:
        """The rows of hidden states that it needs; they become logits, except for embeddings."""
        return self.score_to - self.score_from + self.samples + self.embeds


@dataclass(slots=True)
class StepPlan:
    """Slices of one token come first, then those of several, then forks, which have none."""

    slices: list[Slice]
    tokens: int
    entries: int
    need: int  # flags of need.py
    embeds: int = 0  # entries returned as hidden states
    policy_version: int = 0
    # Places of slices, all of one token, that start where only the devices know; their `start` is an upper bound.
    unsure: list[int] = field(default_factory=list[int])
    # The device applies everything below before the step, in this order.
    copies: list[tuple[int, int]] = field(default_factory=list[tuple[int, int]])  # block -> block
    edits: dict[int, int] = field(default_factory=dict[int, int])  # block tables: cell -> block
    states: dict[int, int] = field(default_factory=dict[int, int])  # states of recurrent layers: row -> row copied
    arrivals: list[Sequence] = field(default_factory=list[Sequence])  # sequences that took a row since the last step

    @property
    def logits(self) -> int:
        """How many entries become logits: the first ones."""
        return self.entries - self.embeds

    @property
    def masked(self) -> bool:
        """Whether the head waits for masks that depend on the tokens of the step before."""
        return bool(self.need & MASK) and any(s.samples and s.sequence.masks is not None for s in self.slices)


class PlanBuilder:
    """The slices of a plan under construction. A planned sequence is never preempted, so slices are only added."""

    __slots__ = ("chunks", "embeds", "entries", "extra", "forks", "need", "singles", "tokens", "unsure")

    def __init__(self) -> None:
        self.singles: list[Slice] = []
        self.chunks: list[Slice] = []
        self.forks: list[Slice] = []
        self.tokens = self.entries = 0
        self.extra = 0  # entries beyond one per sequence: for scoring prompt tokens, for means, and for drafts
        self.unsure: list[int] = []
        self.embeds = 0
        self.need = 0

    def put(self, slice: Slice) -> None:
        count, sequence = slice.count, slice.sequence
        if count == 1:
            if sequence.unsure:
                self.unsure.append(len(self.singles))
            self.singles.append(slice)
        else:
            (self.chunks if count else self.forks).append(slice)
        self.tokens += count
        if slice.samples:
            self.entries += slice.samples
            self.extra += slice.samples - 1
            self.need |= sequence.need
        if slice.embeds:
            self.entries += slice.embeds
            self.embeds += slice.embeds
            self.extra += slice.embeds - 1
        if slice.score_to > slice.score_from:
            self.entries += slice.score_to - slice.score_from
            self.extra += slice.score_to - slice.score_from
            self.need |= sequence.scoring_need

    @property
    def slices(self) -> list[Slice]:
        """All slices, in the order of a plan."""
        return self.singles + self.chunks + self.forks


@dataclass(slots=True)
class StepResult:
    """One entry per row of logits, in the order of the plan's slices, then one per embedding. Of a slice with drafts
    only those count that sampled its drafts, and the next: see `commit.counted`."""

    tokens: list[int]  # of the rows of logits
    valid: list[bool]
    logprobs: np.ndarray | None = None  # float32 [entries]
    ranks: np.ndarray | None = None
    top_tokens: np.ndarray | None = None  # int32 [entries, n]
    top_logprobs: np.ndarray | None = None
    embeddings: np.ndarray | None = None  # float32 [entries, hidden]
