# SPDX-License-Identifier: Apache-2.0
"""What the sampling of a row requires of a step, as independent flags.

A need is an int of bits, so that the need of a step is that of its rows joined by `|`. Bits that include each other are
set together: a filter implies random sampling, and five likeliest tokens imply one. The programs that exist are the
`variants`; a step runs the cheapest that covers its need.
"""

from typing import Literal, NamedTuple

RANDOM = 1
FILTER = 2 | RANDOM  # top-k, top-p, min-p
CONTROLS = 4  # penalties, biases, bad words, a minimum length
MASK = 8  # only some tokens are allowed
LOGPROB = 16  # the log probability of the token
_TOPS = (32 | LOGPROB, 64 | 32 | LOGPROB)  # and of the FEW, or all the likeliest tokens that a request may ask for
FEW = 5  # as many as OpenAI's completions return at most


class Variant(NamedTuple):
    """A program of the head: what it computes for each row."""

    mode: Literal["greedy", "random", "filtered"]  # of the sampling kernel
    controls: bool
    mask: bool
    top_n: int | None  # likeliest tokens; None for no log probabilities at all

    @property
    def controlled(self) -> bool:
        """Whether it reads rows of controls."""
        return self.controls or self.mask

    def __repr__(self) -> str:
        parts = [self.mode, *(name for name in ("controls", "mask") if getattr(self, name))]
        return "+".join([*parts, *([] if self.top_n is None else [f"top{self.top_n}"])])


def of_logprobs(wanted: int | None) -> int:
    """For the log probabilities of `wanted` likeliest tokens: 0 for none, -1 for the whole vocabulary."""
    if wanted is None:
        return 0
    return LOGPROB if wanted == 0 else _TOPS[not 0 < wanted <= FEW]


def allows_drafts(needs: int) -> bool:
    """Whether several tokens of a row can be sampled in one step. With controls or masks each depends on the one before
    it, not only through the model."""
    return not needs & (CONTROLS | MASK)


def variants(max_logprobs: int) -> dict[int, Variant]:
    """The programs by the need that each covers, the cheapest first. The last one covers every need."""
    few, most = _TOPS if max_logprobs > FEW else (_TOPS[1],) * 2
    needs = (0, RANDOM, FILTER, FILTER | CONTROLS, FILTER | LOGPROB, FILTER | few, FILTER | CONTROLS | MASK | most)
    if not max_logprobs:
        few = most = LOGPROB
        needs = (*needs[:5], FILTER | CONTROLS | MASK | LOGPROB)

    def variant(need: int) -> Variant:
        mode = "filtered" if need & FILTER == FILTER else "random" if need & RANDOM else "greedy"
        top_n = max_logprobs if need & most == most else FEW if need & few == few else 0 if need & LOGPROB else None
        return Variant(mode, bool(need & CONTROLS), bool(need & MASK), top_n)

    return {need: variant(need) for need in dict.fromkeys(needs)}
