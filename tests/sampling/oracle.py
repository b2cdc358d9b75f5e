# SPDX-License-Identifier: Apache-2.0
"""The edits of one row of logits, rule by rule and token by token, in float64."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from jaxserve.types.sampling_params import SamplingParams


@dataclass
class Asked:
    """The part of a request that affects its logits, and its tokens so far."""

    params: SamplingParams
    prompt: Sequence[int]
    output: list[int] = field(default_factory=list[int])
    stops: Sequence[int] = ()
    bad_words: Sequence[tuple[int, ...]] = ()


def edits(logits: npt.NDArray[np.float32], asked: Asked) -> npt.NDArray[np.float64]:
    p, out = asked.params, logits.astype(np.float64)
    for token, bias in (p.logit_bias or {}).items():
        out[token] += np.float32(bias)
    for token in range(len(out)):
        if p.allowed_token_ids is not None and token not in p.allowed_token_ids:
            out[token] = -np.inf
    if len(asked.output) < p.min_tokens:
        for token in asked.stops:
            out[token] = -np.inf

    repetition, frequency, presence = (
        np.float64(np.float32(x)) for x in (p.repetition_penalty, p.frequency_penalty, p.presence_penalty)
    )
    for token in {*asked.prompt, *asked.output}:
        out[token] = out[token] / repetition if out[token] > 0 else out[token] * repetition
    for token, count in Counter(asked.output).items():
        out[token] -= frequency * count
        out[token] -= presence

    for token in completions(asked.output, asked.bad_words):
        out[token] = -np.inf
    return out


def completions(output: Sequence[int], bad_words: Sequence[tuple[int, ...]]) -> set[int]:
    """The tokens that would complete a bad word now."""
    return {word[-1] for word in bad_words if list(output[len(output) - len(word) + 1 :]) == list(word[:-1])}
