# SPDX-License-Identifier: Apache-2.0
"""Asks the drafters of running sequences for the drafts of one step, as far as there is room for them."""

import traceback

from jaxserve.engine.capacity import Limits
from jaxserve.engine.schedule import drafts
from jaxserve.engine.schedule.sequence import Sequence


def guesses(
    work: list[tuple[Sequence, int]], *, room: int, blocks: int, limits: Limits
) -> tuple[dict[Sequence, list[int]], int]:
    """Drafts of sequences that decode, and the number of drafters that failed, which are removed. `work`: the sequences
    of the step, with their tokens left to compute. `room`: for so many tokens. `blocks`: in each cache group."""
    found: dict[Sequence, list[int]] = {}
    faulty, size = 0, limits.block_size
    for sequence, left in work:
        most = min(room, drafts.MOST, blocks * size, sequence.goal - sequence.computed - 1)
        if sequence.drafter is None or left > 1 or most <= 0 or sequence.unsure or sequence.siblings:
            continue
        skip = sequence.pending
        try:
            guess = drafts.of(sequence.drafter, sequence.tokens, skip=skip, most=most, vocab_size=limits.vocab_size)
        except Exception:  # the request needs no drafts: it goes on without
            traceback.print_exc()
            sequence.drafter, faulty = None, faulty + 1
            continue
        if guess:
            found[sequence] = guess
            room -= len(guess)
            blocks -= -(-len(guess) // size)
    return found, faulty
