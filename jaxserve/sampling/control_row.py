# SPDX-License-Identifier: Apache-2.0
"""A row of controls as the host sends it: int32 vectors of fixed size, with floats and masks stored as their bits.

Owns the layout of these vectors and the codes in them. No jax; controls.py applies them on the device.

    row vector    [row_size(vocabulary)]    overwrites a whole row, so that nothing of its previous request remains
    count vector  [1 + 2 * COUNT_PAIRS]     the row, tokens, their codes; as many vectors as needed

A token's code is 2 * (times it was generated) + (whether it is in the prompt). It is 0 if no penalty of the request
reads it: without penalties for all tokens, without a repetition penalty for those of the prompt. Only logits with a
nonzero code are edited; all others keep their bits. Ids must already have been checked against the vocabulary.
"""

from collections.abc import Iterable, Sequence

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
COUNT_PAIRS = 2048
COUNT_SIZE = 1 + 2 * COUNT_PAIRS
RECENT_TOKENS = BAD_WORD_TOKENS - 1  # the last generated tokens, as many as a bad word can match
PENALTIES_OFF = (1.0, 0.0, 0.0)  # repetition, frequency, presence

NOWHERE = 2**31 - 1  # an id outside every vocabulary: marks an unused list entry
ANY = -1  # in a bad word: padding before its first token, which matches any token
NO_TOKEN = -2  # in the recent tokens: padding before the first generated one, which matches no token

# Larger repetition penalties would turn logits into infinities; these are already decisive.
_MIN_REPETITION_PENALTY, _MAX_REPETITION_PENALTY = 1e-6, 1e6

_CONTROLS = tuple((each.name, each.off) for each in FIELDS if each.acts is Acts.CONTROL)


def mask_words(vocab_size: int) -> int:
    """The uint32 words of a mask with one bit per token, lowest bit first."""
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


def needs_controls(params: SamplingParams, bad_words: Sequence[tuple[int, ...]]) -> bool:
    """Whether a request needs a row of controls. `bad_words` are token ids."""
    return bool(bad_words) or any(getattr(params, name) != off for name, off in _CONTROLS)


def pack_row(
    *,
    row: int,
    vocab_size: int,
    params: SamplingParams,
    prompt: Sequence[int],
    output: Sequence[int],
    stops: Iterable[int],
    bad_words: Sequence[tuple[int, ...]],
) -> tuple[Vector, list[Vector]]:
    """The row vector, and the count vectors to add after it.

    `output`: the tokens generated so far, if a preempted request resumes. `stops` are masked until min_tokens are
    generated.
    """
    at = sections(vocab_size)
    vector = np.full(row_size(vocab_size), NOWHERE, np.int32)
    vector[at["row"]] = row
    _put_biases(vector, at, params)
    vector[at["allowed"]] = _allowed_mask(vocab_size, params.allowed_token_ids)
    stop_ids = sorted(set(stops))
    vector[at["stop_ids"]][: len(stop_ids)] = stop_ids
    vector[at["min_end"]] = min(len(prompt) + params.min_tokens, NOWHERE)
    penalties = _penalties(params)
    vector[at["penalties"]] = penalties.view(np.int32)
    vector[at["bad_words"]] = _bad_word_table(bad_words).reshape(-1)
    recent = [NO_TOKEN] * RECENT_TOKENS + list(output[-RECENT_TOKENS:])
    vector[at["recent"]] = recent[-RECENT_TOKENS:]
    if tuple(penalties.tolist()) == PENALTIES_OFF:
        return vector, []
    codes = 2 * np.bincount(np.asarray(output, np.int64), minlength=vocab_size)
    if penalties[0] != PENALTIES_OFF[0]:
        codes[np.asarray(prompt, np.int64)] |= 1
    return vector, _count_vectors(row, codes)


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


def _count_vectors(row: int, codes: npt.NDArray[np.int64]) -> list[Vector]:
    tokens = np.flatnonzero(codes)
    vectors: list[Vector] = []
    for start in range(0, len(tokens), COUNT_PAIRS):
        part = tokens[start : start + COUNT_PAIRS]
        vector = np.full(COUNT_SIZE, NOWHERE, np.int32)
        vector[0] = row
        vector[1 : 1 + len(part)] = part
        vector[1 + COUNT_PAIRS :] = 0
        vector[1 + COUNT_PAIRS :][: len(part)] = codes[part]
        vectors.append(vector)
    return vectors
