# SPDX-License-Identifier: Apache-2.0
"""The mean of a prompt's hidden states, which steps return in chunks."""

import numpy as np


class Mean:
    """Adds one hidden state after the other in float64, so that the result does not depend on the chunks."""

    __slots__ = ("_count", "_total", "_weighted")

    def __init__(self, *, weighted: bool) -> None:
        """`weighted`: by position, so that the second token counts twice, the third three times, ..."""
        self._weighted = weighted
        self.restart()

    def restart(self) -> None:
        """Forget all hidden states: the prompt is computed again."""
        self._count = 0
        self._total = np.zeros(0)

    def add(self, states: np.ndarray) -> None:
        """The hidden states [n, hidden] of the next tokens."""
        if not self._count:
            self._total = np.zeros(states.shape[1])
        for state in states:  # as fast as one sum of the matrix, which would need a copy in float64
            self._count += 1
            self._total += state * np.float64(self._count) if self._weighted else state

    def value(self) -> np.ndarray:
        weight = self._count * (self._count + 1) // 2 if self._weighted else self._count
        return self._total / weight
