# SPDX-License-Identifier: Apache-2.0
"""The rotary embedding of a GGUF file as the `rope_parameters` of a config.json."""

import math
from typing import Any

import numpy as np

from convert.gguf.fields import Fields

_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def parameters(fields: Fields, *, head_dim: int) -> dict[str, Any]:
    found: dict[str, Any] = {"rope_type": "default", "rope_theta": fields.real("rope.freq_base", 10_000.0)}
    short, long = fields.factors("rope_factors_short.weight"), fields.factors("rope_factors_long.weight")
    if short is not None and long is not None:
        return found | _longrope(fields, short, long)
    divisors = fields.factors("rope_freqs.weight")
    if divisors is not None and any(each != 1 for each in divisors):
        return found | _divided(fields, divisors, found["rope_theta"], head_dim)
    return found | _scaling(fields)


def _scaling(fields: Fields) -> dict[str, Any]:
    kind = fields.value("rope.scaling.type")
    factor = fields.real("rope.scaling.factor", fields.real("rope.scale_linear", 1.0))
    if kind in ("none", "longrope") or (kind in (None, "linear") and factor in (0, 1)):
        return {}
    if kind in (None, "linear"):
        return {"rope_type": "linear", "factor": factor}
    if kind != "yarn":
        fields.fail(f"the RoPE scaling {kind!r} is not supported", "supported: none, linear, yarn, longrope")
    found: dict[str, Any] = {"rope_type": "yarn", "factor": factor}
    found["original_max_position_embeddings"] = fields.count("rope.scaling.original_context_length")
    keys = {"attention_factor": "yarn_attn_factor", "beta_fast": "yarn_beta_fast", "beta_slow": "yarn_beta_slow"}
    for name, key in keys.items():
        if fields.value(f"rope.scaling.{key}") is not None:
            found[name] = fields.real(f"rope.scaling.{key}")
    return found


def _longrope(fields: Fields, short: list[float], long: list[float]) -> dict[str, Any]:
    found: dict[str, Any] = {"rope_type": "longrope", "short_factor": short, "long_factor": long}
    found["original_max_position_embeddings"] = fields.count("rope.scaling.original_context_length")
    if fields.value("rope.scaling.attn_factor") is not None:
        found["attention_factor"] = fields.real("rope.scaling.attn_factor")
    return found


def _divided(fields: Fields, divisors: list[float], theta: float, head_dim: int) -> dict[str, Any]:
    """For frequencies with a divisor each, as Llama 3's are. The file has the numbers and not
    what they were computed from."""
    if len(divisors) * 2 == head_dim and theta > 1:
        guess = _LLAMA3 | {"factor": max(divisors)}
        if np.allclose(divisors, _llama3(guess, theta, head_dim), rtol=1e-4, atol=0):
            return {"rope_type": "llama3", **guess}
    length = fields.count("context_length")
    same = {"short_factor": divisors, "long_factor": divisors, "attention_factor": 1.0}
    return {"rope_type": "longrope", **same, "original_max_position_embeddings": length}


def _llama3(guess: dict[str, float], theta: float, head_dim: int) -> list[float]:
    found: list[float] = []
    for dim in range(0, head_dim, 2):
        turns = guess["original_max_position_embeddings"] / (2 * math.pi * theta ** (dim / head_dim))
        low, high = guess["low_freq_factor"], guess["high_freq_factor"]
        blend = min(max((turns - low) / (high - low), 0.0), 1.0)
        found.append(1 / ((1 - blend) / guess["factor"] + blend))
    return found
