# SPDX-License-Identifier: Apache-2.0
"""Device rows for tests: the functions of controls.py jitted once, driven with numpy."""

from collections.abc import Sequence

import jax
import numpy as np
import numpy.typing as npt

from jaxserve.sampling import controls as device
from jaxserve.sampling.control_row import ControlRow, pack
from tests.sampling.oracle import Asked

ALLOCATE = jax.jit(device.allocate, static_argnums=(0, 1))
SET_ROWS = jax.jit(device.set_rows, donate_argnums=0)
ADD_COUNTS = jax.jit(device.add_counts, donate_argnums=0)
APPLY = jax.jit(device.apply, static_argnames=("edits", "masks"))
UPDATE = jax.jit(device.update, donate_argnums=0)


def control_row(asked: Asked, vocab_size: int) -> ControlRow:
    return ControlRow(
        vocab_size=vocab_size,
        params=asked.params,
        prompt=asked.prompt,
        stops=set(asked.stops),
        bad_words=asked.bad_words,
    )


class Rows:
    def __init__(self, rows: int, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.controls = ALLOCATE(rows, vocab_size)

    def put(self, row: int, asked: Asked) -> int:
        """Give the row to a request with its tokens so far; return the number of count vectors that this took."""
        return self.put_all({row: asked})

    def put_all(self, arrivals: dict[int, Asked]) -> int:
        """The same for several rows at once."""
        given = [(row, control_row(asked, self.vocab_size), asked.output) for row, asked in arrivals.items()]
        rows, counts = pack(given, self.vocab_size)
        for part in rows:
            self.controls = SET_ROWS(self.controls, part)
        for part in counts:
            self.controls = ADD_COUNTS(self.controls, part)
        return len(counts)

    def apply(
        self, logits: npt.NDArray[np.float32], rows: Sequence[int], positions: Sequence[int], active: Sequence[bool]
    ) -> npt.NDArray[np.float32]:
        at = dict(rows=np.array(rows, np.int32), positions=np.array(positions, np.int32), active=np.array(active))
        return np.asarray(APPLY(self.controls, logits, **at))

    def update(self, rows: Sequence[int], tokens: Sequence[int], active: Sequence[bool]) -> None:
        at = dict(rows=np.array(rows, np.int32), tokens=np.array(tokens, np.int32), active=np.array(active))
        self.controls = UPDATE(self.controls, **at)

    def row(self, row: int) -> dict[str, npt.NDArray[np.generic]]:
        return {name: np.asarray(array)[row].copy() for name, array in vars(self.controls).items()}
