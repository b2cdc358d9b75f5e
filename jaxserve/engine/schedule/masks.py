# SPDX-License-Identifier: Apache-2.0
"""Masks that depend on what a sequence has generated, such as a grammar's.

The next token's mask is known on the host only after the last token was read. The model does not need it: a step's
model is launched first, then the step before it is read, then the masks are sent and the head is launched. So the
devices compute while the host waits and thinks, as without masks.
"""

from typing import Protocol

import numpy as np

from jaxserve.sampling.control_row import mask_words

type Words = np.ndarray[tuple[int, ...], np.dtype[np.int32]]

ROWS_AT_ONCE = 8  # in one call of `set_masks`


class Masks(Protocol):
    """Decides which tokens may follow. A function of the output alone: it is asked again after a preemption."""

    def allowed(self, output: list[int]) -> Words:
        """int32 [mask_words(vocabulary)]: a bit per token, the lowest first."""
        ...


def pack(masks: list[tuple[int, Words]], *, rows: int, vocab_size: int) -> list[Words]:
    """[ROWS_AT_ONCE, 1 + words] each: rows and their masks. Rows that do not exist are padding."""
    vectors: list[Words] = []
    for start in range(0, len(masks), ROWS_AT_ONCE):
        vector = np.full((ROWS_AT_ONCE, 1 + mask_words(vocab_size)), rows, np.int32)
        for line, (row, words) in zip(vector, masks[start : start + ROWS_AT_ONCE], strict=False):
            if not 0 <= row < rows:
                raise RuntimeError(f"row {row} of a mask is not one of {rows}")
            line[0], line[1:] = row, words
        vectors.append(vector)
    return vectors
