# SPDX-License-Identifier: Apache-2.0
"""Prompts and results as arrays, for programs that work on token ids: training loops, evaluation, distillation."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxserve.errors import RequestError
from jaxserve.frontend.prepare import is_one
from jaxserve.types.outputs import RequestOutput

FINISH_REASONS = ("stop", "length", "abort", "error")


class GeneratedArrays(NamedTuple):
    """For B prompts with n samples each. T is the largest max_tokens: equal parameters give equal shapes."""

    tokens: jax.Array  # int32 [B, n, T]; pad_id after the end
    logprobs: jax.Array  # float32 [B, n, T], of these tokens; 0 after the end
    mask: jax.Array  # bool [B, n, T]; False after the end
    lengths: jax.Array  # int32 [B, n]
    finish_reasons: jax.Array  # int32 [B, n], indices into FINISH_REASONS


def prompt_rows(prompts: Any) -> list[Any]:
    """The ids of each prompt, from a list of prompts or from (tokens [B, S], lengths [B])."""
    if isinstance(prompts, tuple) and len(prompts) == 2 and np.ndim(prompts[0]) == 2 and hasattr(prompts[0], "dtype"):
        tokens, lengths = np.asarray(prompts[0]), np.asarray(prompts[1])
        if lengths.shape != tokens.shape[:1] or lengths.dtype.kind not in "iu":
            problem = f"tokens has shape {list(tokens.shape)} and lengths is {lengths.dtype}{list(lengths.shape)}"
            raise RequestError("prompts", problem, "pass one integer length per row")
        if lengths.size and not (lengths.min() >= 0 and lengths.max() <= tokens.shape[1]):
            problem = (
                f"lengths range from {lengths.min()} to {lengths.max()}, but each row has {tokens.shape[1]} tokens"
            )
            raise RequestError("prompts", problem, "correct the lengths")
        return [row[:length].tolist() for row, length in zip(tokens, lengths, strict=True)]
    if is_one(prompts):
        raise RequestError("prompts", "prompts is a single prompt", "pass a list of prompts, or tokens and lengths")
    return np.asarray(prompts).tolist() if hasattr(prompts, "__array__") else list(prompts)


def as_arrays(
    outputs: Sequence[RequestOutput], *, samples: int, width: int, pad_id: int, place: Any
) -> GeneratedArrays:
    """Final outputs as arrays on the devices. Their requests must have log probabilities enabled."""
    shape = (len(outputs), samples, width)
    tokens, logprobs = np.full(shape, pad_id, np.int32), np.zeros(shape, np.float32)
    lengths, reasons = np.zeros(shape[:2], np.int32), np.zeros(shape[:2], np.int32)
    for row, output in enumerate(outputs):
        for sample in output.outputs:
            at = row, sample.index
            count = len(sample.token_ids)
            tokens[at][:count] = sample.token_ids
            pairs = zip(sample.logprobs or (), sample.token_ids, strict=True)
            logprobs[at][:count] = [position[token].logprob for position, token in pairs]
            lengths[at] = count
            reasons[at] = FINISH_REASONS.index(sample.finish_reason or "error")
    mask = np.arange(width, dtype=np.int32) < lengths[..., None]
    return GeneratedArrays(*jax.device_put((tokens, logprobs, mask, lengths, reasons), place))
