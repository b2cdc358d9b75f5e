# SPDX-License-Identifier: Apache-2.0
"""A row of controls as the host sends it: int32 vectors of fixed size, with floats and masks stored as their bits.

Owns the layout of these vectors and the codes in them. No jax; controls.py applies them on the device.

    row vectors    [1 or 8, row_size(vocabulary)]   each overwrites a whole row, so that nothing of its previous request
                                                    remains; unused vectors name a row that does not exist
    count vectors  [3, COUNT_TRIPLES]               rows, tokens, and codes to add; as many vectors as needed

A token's code is 2 * (times it was generated) + (whether it is in the prompt). It is 0 if no penalty of the request
reads it: without penalties for all tokens, without a repetition penalty for those of the prompt. Only logits with a
nonzero code are edited; all others keep their bits. Ids must already have been checked against the vocabulary.
"""

from collections.abc import Collection, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from jaxserve.types.parameters import Acts
from jaxserve.types.sampling_params import (
    BAD_WORD_TOKENS,
    FIELDS,
    MAX_BAD_WORDS,
    MAX_BIASES,
    MAX_STOP_IDS,
    SamplingParams,
)

type Vector = npt.NDArray[np.int32]

MAX_MASKED_STOPS = 2 * MAX_STOP_IDS  # the request's stop ids, and as many end-of-text ids
ROWS_AT_ONCE = (1, 8)
COUNT_TRIPLES = 2048
COUNT_SHAPE = (3, COUNT_TRIPLES)
RECENT_TOKENS = BAD_WORD_TOKENS - 1  # the last generated tokens, as many as a bad word can match
PENALTIES_OFF = (1.0, 0.0, 0.0)  # repetition, frequency, presence

NOWHERE = 2**31 - 1  # an id outside every vocabulary: marks an unused list entry
ANY = -1  # in a bad word: padding before its first token, which matches any token
NO_TOKEN = -2  # in the recent tokens: padding before the first generated one, which matches no token

# Larger repetition penalties would turn logits into infinities; these are already decisive.
_MIN_REPETITION_PENALTY, _MAX_REPETITION_PENALTY = 1e-6, 1e6

_CONTROLS = tuple((each.name, each.off) for each in FIELDS if each.acts is Acts.CONTROL)
_MASKS = tuple((each.name, each.off) for each in FIELDS if each.acts is Acts.MASK)


def mask_words(vocab_size: int) -> int:
    """The number of uint32 words in a mask with one bit per token, lowest bit first."""
    return -(-vocab_size // 32)


def sections(vocab_size: int) -> dict[str, slice]:
    """The sections of a row vector: the row's number, then the fields of `Controls` by name."""
    sizes = {
        "row": 1,
        "bias_ids": MAX_BIASES,
        "bias_values": MAX_BIASES,
        "allowed": mask_words(vocab_size),
        "stop_ids": MAX_MASKED_STOPS,
        "min_end": 1,
        "penalties": len(PENALTIES_OFF),
        "bad_words": MAX_BAD_WORDS * BAD_WORD_TOKENS,
        "recent": RECENT_TOKENS,
    }
    ends = np.cumsum(list(sizes.values())).tolist()
    return {name: slice(end - size, end) for (name, size), end in zip(sizes.items(), ends, strict=True)}


def row_size(vocab_size: int) -> int:
    return sections(vocab_size)["recent"].stop


def kinds(params: SamplingParams, bad_words: Sequence[tuple[int, ...]]) -> tuple[bool, bool]:
    """Whether a request edits logits, and whether it allows only some tokens. `bad_words` are token ids."""
    return bool(bad_words) or _differ(params, _CONTROLS), _differ(params, _MASKS)


def _differ(params: SamplingParams, neutral: tuple[tuple[str, object], ...]) -> bool:
    return any(getattr(params, name) != off for name, off in neutral)


class ControlRow:
    """A request's row vector, without the row's number and generated tokens, and the codes of its prompt. Made once,
    when the request arrives."""

    __slots__ = ("_at", "_penalized", "_prompt", "_vector")

    def __init__(
        self,
        *,
        vocab_size: int,
        params: SamplingParams,
        prompt: Sequence[int],
        stops: Collection[int],
        bad_words: Sequence[tuple[int, ...]],
    ) -> None:
        """`stops` are masked until min_tokens are generated."""
        self._at = at = sections(vocab_size)
        self._vector = vector = np.full(row_size(vocab_size), NOWHERE, np.int32)
        _put_biases(vector, at, params)
        vector[at["allowed"]] = _allowed_mask(vocab_size, params.allowed_token_ids)
        if params.min_tokens:
            vector[at["stop_ids"]][: len(stops)] = sorted(stops)
        vector[at["min_end"]] = min(len(prompt) + params.min_tokens, NOWHERE)
        penalties = _penalties(params)
        vector[at["penalties"]] = penalties.view(np.int32)
        vector[at["bad_words"]] = _bad_word_table(bad_words).reshape(-1)
        vector[at["recent"]] = NO_TOKEN
        self._penalized = tuple(penalties.tolist()) != PENALTIES_OFF
        repeats = penalties[0] != PENALTIES_OFF[0]
        self._prompt = _distinct(prompt, vocab_size)[0] if repeats else np.zeros(0, np.int32)

    def put(self, vector: Vector, row: int, output: Sequence[int]) -> None:
        """Fill a row vector. `output`: the tokens generated so far, if a preempted request resumes."""
        vector[:] = self._vector
        vector[self._at["row"]] = row
        if len(output):
            recent = output[-RECENT_TOKENS:]
            vector[self._at["recent"]][-len(recent) :] = recent

    def codes(self, output: Sequence[int]) -> tuple[Vector, Vector]:
        """Tokens and the codes to add to their counts."""
        if not (len(output) and self._penalized):
            return self._prompt, np.ones(self._prompt.size, np.int32)
        tokens, counts = _distinct(output, None)
        alone = self._prompt[np.isin(self._prompt, tokens, assume_unique=True, invert=True)]
        codes = 2 * counts + np.isin(tokens, self._prompt, assume_unique=True)
        return np.concatenate([alone, tokens]), np.concatenate([np.ones(alone.size, np.int32), codes])


def pack(
    arrivals: Sequence[tuple[int, ControlRow, Sequence[int]]], vocab_size: int
) -> tuple[list[Vector], list[Vector]]:
    """The vectors of requests that take rows, each given as its row, its controls and its output so far."""
    rows: list[Vector] = []
    for start, count in _parts(len(arrivals)):
        vectors = np.full((count, row_size(vocab_size)), NOWHERE, np.int32)
        for vector, (row, controls, output) in zip(vectors, arrivals[start : start + count], strict=False):
            controls.put(vector, row, output)
        rows.append(vectors)
    pairs = [(row, *controls.codes(output)) for row, controls, output in arrivals]
    triples = [np.stack([np.full(tokens.size, row, np.int32), tokens, codes]) for row, tokens, codes in pairs]
    return rows, _count_vectors(np.concatenate(triples, axis=1)) if triples else []


def _parts(count: int) -> Iterator[tuple[int, int]]:
    """The first row and the number of rows of each call of `set_rows`."""
    start = 0
    while start < count:
        size = ROWS_AT_ONCE[0] if count - start == 1 else ROWS_AT_ONCE[1]
        yield start, size
        start += size


def _distinct(tokens: Sequence[int], vocab_size: int | None) -> tuple[Vector, Vector]:
    """The distinct tokens and their counts."""
    found, counts = np.unique(np.asarray(tokens, np.int32), return_counts=True)
    if found.size and (found[0] < 0 or (vocab_size is not None and found[-1] >= vocab_size)):
        raise IndexError(f"token ids range from {found[0]} to {found[-1]}, the vocabulary has {vocab_size}")
    return found, counts.astype(np.int32)


def _put_biases(vector: Vector, at: dict[str, slice], params: SamplingParams) -> None:
    biases = {token: bias for token, bias in (params.logit_bias or {}).items() if bias}
    values = np.zeros(MAX_BIASES, np.float32)
    values[: len(biases)] = list(biases.values())
    vector[at["bias_ids"]][: len(biases)] = list(biases)
    vector[at["bias_values"]] = values.view(np.int32)


def _allowed_mask(vocab_size: int, allowed: Sequence[int] | None) -> Vector:
    if allowed is None:
        return np.full(mask_words(vocab_size), -1, np.int32)
    bits = np.zeros(mask_words(vocab_size) * 32, np.bool_)
    bits[np.asarray(allowed, np.int64)] = True
    return np.packbits(bits, bitorder="little").view("<i4").astype(np.int32)


def _penalties(params: SamplingParams) -> npt.NDArray[np.float32]:
    repetition = min(max(params.repetition_penalty, _MIN_REPETITION_PENALTY), _MAX_REPETITION_PENALTY)
    return np.array([repetition, params.frequency_penalty, params.presence_penalty], np.float32)


def _bad_word_table(bad_words: Sequence[tuple[int, ...]]) -> Vector:
    """[MAX_BAD_WORDS, BAD_WORD_TOKENS], each sequence right-aligned."""
    table = np.full((MAX_BAD_WORDS, BAD_WORD_TOKENS), ANY, np.int32)
    table[:, -1] = NOWHERE
    for line, tokens in enumerate(bad_words):
        table[line, -len(tokens) :] = tokens
    return table


def _count_vectors(triples: Vector) -> list[Vector]:
    """[3, n] rows, tokens and codes as count vectors."""
    vectors: list[Vector] = []
    for start in range(0, triples.shape[1], COUNT_TRIPLES):
        part = triples[:, start : start + COUNT_TRIPLES]
        vector = np.full(COUNT_SHAPE, NOWHERE, np.int32)
        vector[:, : part.shape[1]] = part
        vectors.append(vector)
    return vectors
