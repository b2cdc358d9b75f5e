# SPDX-License-Identifier: Apache-2.0
"""The attention head shapes that benchmarks time and tune, from models that the server supports."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Heads:
    name: str
    heads: int
    kv_heads: int
    dim: int
    window: int | None = None
    soft_cap: float | None = None


LLAMA_8B = Heads("llama-8b", 32, 8, 128)
QWEN3_0_6B = Heads("qwen3-0.6b", 16, 8, 128)
QWEN3_30B = Heads("qwen3-30b-a3b", 32, 4, 128)
QWEN3_235B = Heads("qwen3-235b-a22b", 64, 4, 128)
GEMMA_9B = Heads("gemma2-9b", 16, 8, 256, soft_cap=50.0)
SMALL = Heads("small", 12, 4, 64)  # a model of 100 million parameters, as it may run on a CPU
TINY = Heads("tiny", 4, 2, 16)

DEEPSEEK_HEADS, DEEPSEEK_LATENT, DEEPSEEK_ROPE = 128, 512, 64
