# SPDX-License-Identifier: Apache-2.0
"""The least time that an engine's work can take: bytes by the copy bandwidth, operations by the matmul rate.

decode    each step reads every weight of the layers and of the head once, and the rows' KV
prefill   two operations per weight and token, and causal attention; the head for the last token only
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.gpu.times import steps as time_steps
from benchmarks.gpu.times.timing import Ceilings
from jaxserve.engine.capacity import token_bytes
from jaxserve.models import param_layout
from jaxserve.models.spec import Attention, ModelSpec, Moe

TABLE = Ceilings(4300.0, 790.0)  # measured on an H200: gives floors that do not depend on this run's `machine` section


@dataclass(frozen=True)
class Roofline:
    spec: ModelSpec
    params: Any

    def step_bytes(self, rows: int, context: float) -> float:
        """The bytes that one decode step reads; `context` is the mean over the rows."""
        return self.weight_bytes(rows) + self.kv_bytes(rows * context)

    def weight_bytes(self, rows: int) -> float:
        return time_steps.read_bytes(self.spec, self.params, time_steps.StepCase("", rows, 0))

    def kv_bytes(self, tokens: float) -> float:
        return tokens * token_bytes(self.spec, "bfloat16")

    def prefill_flops(self, tokens: int) -> float:
        """The operations of one whole prompt, in any number of chunks."""
        total = 2.0 * self.spec.vocab_size * self.spec.hidden
        for path, leaf in param_layout.leaves(self.params):
            if path[0] != "layers" or len(leaf.shape) < 2:
                continue
            used, mlp = float(math.prod(leaf.shape)), self.spec.layers[int(path[1])].mlp
            if "experts" in path and isinstance(mlp, Moe):
                used *= mlp.router.top_k / mlp.router.experts
            total += 2 * used * tokens
        for layer in self.spec.layers:
            if isinstance(layer.attention, Attention):
                total += 4.0 * layer.attention.heads * layer.attention.head_dim * tokens * (tokens + 1) / 2
        return total

    def offline_ms(self, done: Sequence[tuple[int, int]], *, rows: int, ceilings: Ceilings) -> float | None:
        """The floor for requests of (prompt, answer) tokens, at most `rows` of them at once. The first token of an
        answer comes with the prompt; every other takes a decode step, which attends to all tokens before it."""
        if ceilings.copy is None or ceilings.matmul is None:
            return None
        answers = [answer for _, answer in done]
        steps = max(max(answers, default=1) - 1, -(-sum(n - 1 for n in answers) // rows))
        attended = sum((n - 1) * (prompt + n / 2) for prompt, n in done)
        moved = steps * self.weight_bytes(rows) + self.kv_bytes(attended)
        return moved / ceilings.copy / 1e6 + sum(self.prefill_flops(p) for p, _ in done) / ceilings.matmul / 1e9


def bytes_ms(moved: float, ceilings: Ceilings) -> float | None:
    return moved / ceilings.copy / 1e6 if ceilings.copy else None


def percent(floor_ms: float | None, ms: float) -> float | None:
    return None if floor_ms is None else 100 * floor_ms / ms
