# SPDX-License-Identifier: Apache-2.0
"""Section `time_steps`: a whole decode step of published models, with random weights.

Steps follow each other as in serving, each with the cache of the one before. If the device is slower than the dispatch,
the result is the device's time. The floor: every weight that is used, and the rows' KV, read once.
"""

import math
import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import published
from benchmarks.gpu.book import Page, Row
from benchmarks.gpu.times.timing import Ceilings, random_pool
from jaxserve.engine.capacity import token_bytes
from jaxserve.models import decoder, kv_cache, param_layout
from jaxserve.models.inputs import ModelInputs, PagedTokens
from jaxserve.models.spec import ModelSpec, Moe
from pallas_kernels.ragged import Ragged

COLUMNS = ("us", "spread", "gbps", "copy_pct", "tokens_per_s", "temp_mb")
BLOCK_SIZE = 16


@dataclass(frozen=True)
class StepCase:
    model: str
    rows: int
    context: int

    @property
    def name(self) -> str:
        return f"{self.model} {self.rows} x {self.context}"


def cases(tiny: bool) -> list[StepCase]:
    if tiny:
        return [StepCase("tiny", 2, 40)]
    sizes = ((1, 1024), (64, 1024), (64, 4096), (8, 1024))
    return [StepCase(model, rows, context) for model in published.MODELS for rows, context in sizes]


def inputs(case: StepCase) -> ModelInputs:
    """Every row decodes its last token; its blocks are scattered over the pool."""
    width = -(-case.context // BLOCK_SIZE)
    blocks = 1 + np.random.default_rng(4).permutation(case.rows * width).reshape(case.rows, width)
    last = case.context - 1
    slots = blocks[:, last // BLOCK_SIZE] * BLOCK_SIZE + last % BLOCK_SIZE
    numbers = np.arange(case.rows)
    ragged = Ragged(
        block_tables=_ints(blocks),
        kv_lens=_ints(np.full(case.rows, case.context)),
        cu_q_lens=_ints(np.arange(case.rows + 1)),
        distribution=_ints([case.rows, case.rows]),
        decode_only=True,
    )
    return ModelInputs(
        tokens=_ints(numbers),
        positions=_ints(np.full(case.rows, last)),
        paged=(PagedTokens(slots=_ints(slots), ragged=ragged),),
        sampled=_ints(numbers),
    )


def _ints(values: Any) -> jax.Array:
    return jnp.asarray(values, jnp.int32)


def read_bytes(spec: ModelSpec, params: Any, case: StepCase) -> float:
    """The bytes that a step reads: weights of the experts that its tokens choose at random, all other weights, KV."""
    total = 0.0
    for path, leaf in param_layout.leaves(params):
        size = float(math.prod(leaf.shape) * leaf.dtype.itemsize)
        if path[0] == "embed" and not spec.tied:
            continue  # one row per token
        if "experts" in path:
            mlp = spec.layers[int(path[1])].mlp
            assert isinstance(mlp, Moe)
            size *= 1 - (1 - mlp.router.top_k / mlp.router.experts) ** case.rows
        total += size
    return total + token_bytes(spec, "bfloat16") * case.rows * case.context


def measure(case: StepCase, weights: "Weights", page: Page) -> Row:
    spec, params = weights.of(case.model)
    blocks = 2 + case.rows * -(-case.context // BLOCK_SIZE)
    cache = kv_cache.allocate(spec, blocks=blocks, block_size=BLOCK_SIZE, dtype=jnp.bfloat16)
    given = inputs(case)
    compiled = jax.jit(partial(decoder.step, spec), donate_argnums=1).lower(params, cache, given).compile()
    times: list[float] = []
    count = 2 if page.settings.tiny else 20
    for turn in range(9):
        started = time.perf_counter()
        for _ in range(count):
            logits, cache = compiled(params, cache, given)
        jax.block_until_ready((logits, cache))
        if turn:
            times.append(1e6 * (time.perf_counter() - started) / count)
    us, (low, high) = float(np.median(times)), np.quantile(times, (0.25, 0.75))
    size, copy = read_bytes(spec, params, case), Ceilings.load(page).copy
    gbps = size / us / 1e3
    memory = compiled.memory_analysis()
    return {
        "us": us,
        "spread": float((high - low) / us),
        "bytes": size,
        "gbps": gbps,
        "copy_pct": 100 * gbps / copy if copy else None,
        "tokens_per_s": case.rows * 1e6 / us,
        "temp_mb": memory.temp_size_in_bytes / 1e6 if memory else None,
    }


class Weights:
    """The random parameters of one model at a time."""

    def __init__(self) -> None:
        self._model, self._made = "", (None, None)

    def of(self, model: str) -> tuple[ModelSpec, Any]:
        if model != self._model:
            self._made = (None, None)
            spec = published.tiny() if model == "tiny" else published.MODELS[model]()
            abstract = param_layout.abstract_params(spec, jnp.bfloat16)
            # Small, so that no sum overflows; the time does not depend on the values.
            params = jax.tree.map(lambda leaf: random_pool(leaf) * jnp.asarray(0.02, leaf.dtype), abstract)
            self._model, self._made = model, (spec, params)
        return self._made  # pyright: ignore[reportReturnType]


def run(page: Page) -> None:
    weights = Weights()
    page.each(cases(page.settings.tiny), lambda case: measure(case, weights, page), name=lambda case: case.name)
