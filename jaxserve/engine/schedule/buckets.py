# SPDX-License-Identifier: Apache-2.0
"""The ladder of shapes: what is compiled before the engine is ready, and nothing after.

rows    of decoding steps, and of logits: 1 2 4 8 16 32 64 96 128 192 256 384 ...
tokens  of steps that hold chunks of prompts: the same from 64 on
"""

from bisect import bisect_left
from dataclasses import dataclass

SMALLEST_MIXED = 64


def ladder(top: int) -> tuple[int, ...]:
    """Steps of at most a half from 32 on, and the top itself."""
    steps = [1, 2, 4, 8, 16, 32]
    while steps[-1] < top:
        power = 1 << (steps[-1].bit_length() - 1)
        steps.append(power + power // 2 if steps[-1] == power and power >= 64 else 2 * power)
    return (*(step for step in steps if step < top), top)


def fitting(steps: tuple[int, ...], size: int) -> int:
    """The smallest that holds `size`."""
    return steps[bisect_left(steps, size)]


@dataclass(frozen=True)
class Buckets:
    """For `rows` sequences at once, `tokens` in a step, and `score_rows` prompt tokens scored in a step."""

    rows: int
    tokens: int
    score_rows: int

    @property
    def decode(self) -> tuple[int, ...]:
        return ladder(self.rows)

    @property
    def mixed(self) -> tuple[int, ...]:
        """Tokens that are not there are computed all the same: with powers of two alone the demo's first token after 90
        took 1.8 times that after 64, with these it takes 1.5 times that."""
        return tuple(step for step in ladder(self.tokens) if step >= min(SMALLEST_MIXED, self.tokens))

    @property
    def heads(self) -> tuple[int, ...]:
        """Rows of logits; those of a step can be `entries` at most."""
        return (*self.decode, self.entries)

    @property
    def scoring_heads(self) -> tuple[int, ...]:
        """Coarser, for the variants that take longest to compile."""
        return tuple(rows for rows in self.heads if rows in (1, 4, 16, 64, 256, 1024, self.rows, self.entries))

    @property
    def entries(self) -> int:
        return self.rows + self.score_rows
