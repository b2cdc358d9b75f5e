# SPDX-License-Identifier: Apache-2.0
"""The step sizes that are compiled; a step is padded to the smallest one that fits it and is available.

rows    of decoding steps, and of logits: 1 2 4 8 16 32 64 96 128 192 256 384 ...
tokens  of steps with prompt chunks: the same, from 64
"""

from bisect import bisect_left
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import Self

SMALLEST_MIXED = 64


def ladder(top: int) -> tuple[int, ...]:
    """Sizes up to `top`: powers of two, and from 64 on also 1.5 times each. The last is `top` itself."""
    steps = [1, 2, 4, 8, 16, 32]
    while steps[-1] < top:
        power = 1 << (steps[-1].bit_length() - 1)
        steps.append(power + power // 2 if steps[-1] == power and power >= 64 else 2 * power)
    return (*(step for step in steps if step < top), top)


def fitting(steps: tuple[int, ...], size: int) -> int:
    """The smallest step that is at least `size`."""
    return steps[bisect_left(steps, size)]


def default_score_rows(tokens: int) -> int:
    """How many prompt tokens a step can score, or add to means. Few, since the last layer computes only the KV of all
    other tokens."""
    return min(tokens, max(64, min(tokens // 8, 256)))


@dataclass(frozen=True)
class Buckets:
    """All compiled sizes, each ladder in ascending order."""

    decode: tuple[int, ...]  # rows, each with one token
    mixed: tuple[int, ...]  # tokens
    heads: tuple[int, ...]  # rows of logits
    scoring_heads: tuple[int, ...]  # the same, but coarser, for the variants that take longest to compile

    @classmethod
    def of(cls, rows: int, tokens: int, score_rows: int | None = None) -> Self:
        """For `rows` concurrent sequences, `tokens` in a step, and `score_rows` prompt tokens scored in a step."""
        entries = rows + (default_score_rows(tokens) if score_rows is None else score_rows)
        decode = ladder(rows)
        heads = (*decode, entries)
        # Padding tokens are computed too. With powers of two alone, the first token after a prompt of 90 took the demo
        # 1.8 times as long as after one of 64; with these steps it takes 1.5 times as long.
        mixed = tuple(step for step in ladder(tokens) if step >= min(SMALLEST_MIXED, tokens))
        coarse = {1, 4, 16, 64, 256, 1024, rows, entries}
        return cls(decode, mixed, heads, tuple(size for size in heads if size in coarse))

    @property
    def rows(self) -> int:
        return self.decode[-1]

    @property
    def tokens(self) -> int:
        return self.mixed[-1]

    @property
    def entries(self) -> int:
        """The most rows of logits that a step may have."""
        return self.heads[-1]

    @property
    def score_rows(self) -> int:
        return self.entries - self.rows


type Kind = Hashable  # "decode" and "mixed" steps, "embed", each variant of the head


class Available:
    """The sizes that steps may use now. It only grows, between two steps: see Runner.adopt."""

    def __init__(self, sizes: Iterable[tuple[Kind, int]] = ()) -> None:
        self._steps: dict[Kind, tuple[int, ...]] = {}
        for kind, size in sizes:
            self.add(kind, size)

    def add(self, kind: Kind, size: int) -> None:
        self._steps[kind] = tuple(sorted({*self._steps.get(kind, ()), size}))

    def fits(self, kind: Kind, size: int) -> bool:
        """Whether a program of this kind can do a step of this size."""
        return kind in self._steps and self._steps[kind][-1] >= size

    def fitting(self, kind: Kind, size: int) -> int:
        """The smallest available size that is at least `size`."""
        return fitting(self._steps[kind], size)
