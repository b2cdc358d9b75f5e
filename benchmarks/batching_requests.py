# SPDX-License-Identifier: Apache-2.0
"""The requests of benchmarks.batching, drawn from a seed: how many there are and how uneven their lengths."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from benchmarks import serving
from benchmarks.serving import Work

LONGEST = 256  # tokens of prompt and answer together, except in the memory part
FIRST_ID = 16  # lower ids are special tokens


class Asked(NamedTuple):
    prompt: list[int]
    new: int


@dataclass(frozen=True, kw_only=True)
class Scale:
    counts: tuple[int, ...]  # of chats at once
    rows: int  # concurrent sequences in jaxserve
    tokens: int  # in one of its steps
    chats: Work
    offline: int  # requests
    offline_prompt: tuple[int, int]
    offline_new: tuple[int, int]
    memory: Work
    memory_requests: int
    memory_rows: int
    memory_longest: int
    reservations: int  # the size of the KV cache, in reservations


FULL = Scale(
    counts=(1, 8, 32, 128, 256),
    rows=256,
    tokens=512,
    chats=Work(mix="sharegpt", prompt=32, new=32, longest=128),
    offline=1000,
    offline_prompt=(20, 60),
    offline_new=(80, 120),
    memory=Work(mix="sharegpt", prompt=60, new=100, longest=1024),
    memory_requests=512,
    memory_rows=256,
    memory_longest=2048,
    reservations=16,
)
TINY = Scale(
    counts=(1, 2),
    rows=2,
    tokens=64,
    chats=Work(mix="sharegpt", prompt=6, new=4, longest=16),
    offline=5,
    offline_prompt=(2, 6),
    offline_new=(8, 12),
    memory=Work(mix="sharegpt", prompt=6, new=10, longest=32),
    memory_requests=20,
    memory_rows=4,
    memory_longest=64,
    reservations=2,
)


def chats(work: Work, vocab: int, count: int) -> list[Asked]:
    """Requests with lengths as benchmarks.serving draws them, and random ids."""
    rng = np.random.default_rng((work.seed, count))
    lengths = [(len(text.split()), new) for text, new in serving.prompts(work, count)]
    return [Asked(rng.integers(FIRST_ID, vocab, length).tolist(), new) for length, new in lengths]


def even(sizes: Scale, vocab: int, count: int, *, seed: int) -> list[Asked]:
    """Requests with lengths that are uniform between two bounds, and random ids."""
    rng = np.random.default_rng((seed, count))
    prompts = rng.integers(*sizes.offline_prompt, count, endpoint=True)
    new = rng.integers(*sizes.offline_new, count, endpoint=True)
    return [
        Asked(rng.integers(FIRST_ID, vocab, length).tolist(), int(one))
        for length, one in zip(prompts, new, strict=True)
    ]
