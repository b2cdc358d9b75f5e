# SPDX-License-Identifier: Apache-2.0
"""Weights of the golden checkpoints, made from a seed and a name, so that none need be stored.

Only the raw output of the bit generator is used: numpy promises that this never changes, and does
not promise it for the distributions. Python 3.11, numpy and the standard library are enough.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

EMBEDDINGS = ("embed_tokens", "embed_positions", "embed_in", "word_embeddings", "wte", "wpe")
ROUTERS = ("mlp.gate.weight", "block_sparse_moe.gate.weight", "router.weight", "shared_expert_gate.weight")
# These multiply a row vector from the right, so their inputs are the dimension before the last.
INPUTS_FIRST = ("c_attn", "c_proj", "c_fc", "experts.gate_up_proj", "experts.down_proj")


@dataclass(frozen=True)
class Rules:
    """Exceptions for tensors whose name has a given part in it."""

    gains: Mapping[str, float] = field(default_factory=dict)  # the random part times this; all that match
    centres: Mapping[str, float] = field(default_factory=dict)  # the mean, instead of 1 for norms and 0
    zeros: Mapping[str, Sequence[int]] = field(default_factory=dict)  # rows that are zero
    copies: Mapping[str, str] = field(default_factory=dict)  # whole names: equal to another tensor


def uniform(seed: int, name: str, shape: Sequence[int]) -> np.ndarray:
    """Values in -1..1 as float64, a function of the seed and the name alone."""
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=16).digest()
    raw = np.random.PCG64(int.from_bytes(digest, "little")).random_raw(int(np.prod(shape, dtype=np.int64)))
    return ((raw >> np.uint64(40)).astype(np.float64) * 2.0**-23 - 1.0).reshape(tuple(shape))


def tensor(seed: int, name: str, shape: Sequence[int], rules: Rules) -> np.ndarray:
    """One tensor in float32, every value of it exact in bfloat16 too."""
    name = rules.copies.get(name, name)
    centre, reach = _spread(name, tuple(shape))
    for part, gain in rules.gains.items():
        reach *= gain if part in name else 1.0
    for part, value in rules.centres.items():
        centre = value if part in name else centre
    exact = (centre + reach * uniform(seed, name, shape)).astype(np.float32)
    rounded = (exact.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
    for part, rows in rules.zeros.items():
        if part in name:
            rounded[list(rows)] = 0.0
    return rounded


def _spread(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Centre and reach of the values: wide, so that one wrong term moves the logits."""
    last = name.rsplit(".", 1)[-1]
    layer = name.removesuffix(".weight").rsplit(".", 1)[-1]
    if last == "weight" and ("norm" in name or layer.startswith("ln_")):
        return 1.0, 0.3
    if last == "sinks":
        return 0.0, 2.0
    if last.endswith("bias") or len(shape) < 2:
        return 0.0, 0.5
    inputs = shape[-2] if any(part in name for part in INPUTS_FIRST) else shape[-1]
    if any(part in name for part in EMBEDDINGS):
        deviation = 1.0
    elif name.endswith(ROUTERS):
        deviation = 2.0 / inputs**0.5
    else:
        deviation = 1.25 / inputs**0.5
    return 0.0, deviation * 3**0.5  # a uniform variable deviates by its reach / sqrt(3)
