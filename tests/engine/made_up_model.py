# SPDX-License-Identifier: Apache-2.0
"""A made-up model: what a token's KV depends on, and what is drawn from a history. For the device and the oracle."""

import random
import struct
from collections.abc import Mapping
from zlib import crc32

import numpy as np

from jaxserve.engine.schedule.packing import Ints
from jaxserve.sampling.columns import COLUMNS

type Digests = np.ndarray[tuple[int, ...], np.dtype[np.int64]]

POISON = -7  # a position that no token has
TOP = 2  # likeliest tokens

VOCAB, EOS = 40, 3
STEMS = [random.Random(seed).choices(range(VOCAB), k=40) for seed in (1, 2)]


def digest(attended: Ints) -> int:
    """A digest of the tokens that a token attends to, including itself: what its KV depends on."""
    return crc32(attended.astype("<i4").tobytes())


def advanced(state: int, token: int) -> int:
    """The state of a recurrent layer after a token."""
    return crc32(struct.pack("<Ii", state, token))


def first_seen(window: int | None, position: int) -> int:
    """The first token that a token attends to."""
    return 0 if window is None else max(0, position - window + 1)


def draw(tokens: Ints, digests: Digests, way: bytes) -> int:
    """A hash of a whole history and of the row's sampling parameters; the other results of a step derive from it."""
    return crc32(digests.astype("<i8").tobytes(), crc32(tokens.astype("<i4").tobytes(), crc32(way)))


def pick(drawn: int, vocab_size: int, masked: frozenset[int]) -> int:
    return next(token for i in range(vocab_size) if (token := (drawn + i) % vocab_size) not in masked)


def likelihood(drawn: int, token: int) -> tuple[float, int, list[int], list[float]]:
    """The log probability and rank of a token, and the most likely tokens with their log probabilities."""
    mixed = crc32(struct.pack("<Iq", drawn, token))
    return -(mixed % 1024) / 64, 1 + mixed % 9, [drawn % 11, drawn % 13], [-(drawn % 64) / 8, -(drawn % 32) / 4]


def embedded(drawn: int) -> list[int]:
    """Small whole numbers, which are exact in float32."""
    return list(struct.pack("<I", drawn))


def way(position: int, numbers: list[int], recent: list[int], codes: Mapping[int, int]) -> bytes:
    """A row's sampling parameters; a greedy row ignores most of them."""
    used = numbers if numbers[COLUMNS.index("temperature")] else numbers[:1]
    known = [*recent, *(number for pair in sorted(codes.items()) if pair[1] for number in pair)]
    return struct.pack(f"<q{len(used)}q{len(known)}q", position, *used, *known)
