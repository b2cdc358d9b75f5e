# SPDX-License-Identifier: Apache-2.0
"""Draft tokens: guesses of the tokens that follow, all of which one step checks.

The step computes a row's next token and the drafts after it, and samples after each of them. A draft is right if it
equals the token sampled in its place. The row keeps the samples up to the first one that differs from its draft; the
KV of wrong drafts is overwritten later. The noise of sampling depends only on seed, position and token, so rows get
exactly the tokens that they would get one at a time, greedy or random. Rows with controls or masks would not, because
their logits depend on the tokens sampled before in the same step: they get no drafts.
"""

from typing import Protocol

MOST = 16  # drafts of a row in one step


class Drafter(Protocol):
    def propose(self, tokens: list[int]) -> list[int]:
        """What may follow these tokens of prompt and output. It is asked at every step."""
        ...


def of(drafter: Drafter, tokens: list[int], *, skip: int, most: int, vocab_size: int) -> list[int]:
    """At most `most` drafts, up to the first that is not a token. `skip`: how many are sampled by steps in flight."""
    found = list(drafter.propose(list(tokens))[skip : skip + most])
    for at, token in enumerate(found):
        if not (isinstance(token, int) and 0 <= token < vocab_size):  # pyright: ignore[reportUnnecessaryIsInstance]
            return found[:at]
    return found
