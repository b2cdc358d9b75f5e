# SPDX-License-Identifier: Apache-2.0
"""Section `time_grouped`: the two matmuls of a mixture of experts, gate-up and down.

The floor of decode: the weights of every expert that has a token, read once. Each call computes its row tiles, as each
layer of a model does, in a few tiny kernels; they are timed with it.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu.book import Page
from benchmarks.gpu.times import timing
from benchmarks.gpu.times.attention import of_kind, spec
from benchmarks.gpu.times.timing import Arrays, Timed
from pallas_kernels.grouped_matmul import grouped_matmul
from pallas_kernels.tuning import MatmulTiles, Tiles


@dataclass(frozen=True)
class ExpertSizes:
    name: str
    groups: int
    hidden: int
    width: int
    used: int  # experts per token

    @property
    def products(self) -> dict[str, tuple[int, int]]:
        """The n and k of each product."""
        return {"gate_up": (2 * self.width, self.hidden), "down": (self.hidden, self.width)}


QWEN3_30B = ExpertSizes("qwen3-30b-a3b", 128, 2048, 768, 8)
DEEPSEEK = ExpertSizes("deepseek-v2-lite", 64, 2048, 1408, 6)
MIXTRAL = ExpertSizes("mixtral-8x7b", 8, 4096, 14336, 2)
GPT_OSS = ExpertSizes("gpt-oss-20b", 32, 2880, 2880, 4)
TINY = ExpertSizes("tiny", 4, 32, 24, 2)


def routed(rng: np.random.Generator, model: ExpertSizes, tokens: int) -> np.ndarray:
    """The offsets after every token has chosen distinct experts uniformly at random."""
    chosen = np.argsort(rng.random((tokens, model.groups)), axis=1)[:, : model.used]
    counts = np.bincount(chosen.reshape(-1), minlength=model.groups)
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)


def grouped_case(model: ExpertSizes, tokens: int, product: str, *, tiles: Tiles | None = None) -> Timed:
    """A call's output is added to the next call's offsets as a zero, so the calls form a chain."""
    n, k = model.products[product]
    rows, rng = tokens * model.used, np.random.default_rng(6)
    size = 2.0 * n * k
    sets = timing.sets_needed(min(rows, model.groups) * size)
    offsets = [routed(rng, model, tokens) for _ in range(sets)]
    active = float(np.mean([(np.diff(one) > 0).sum() for one in offsets]))

    def arrays(pools: tuple[jax.Array, ...]) -> Arrays:
        lhs = jax.random.normal(jax.random.key(7), (rows, k), jnp.float32).astype(jnp.bfloat16)
        return Arrays(np.zeros((), np.int32), (lhs, pools[0]), offsets)

    def step(zero: jax.Array, fixed: tuple[jax.Array, jax.Array], one: jax.Array) -> jax.Array:
        out = grouped_matmul(*fixed, one + zero, tiles=of_kind(MatmulTiles, tiles))
        return (out[0, 0].astype(jnp.float32) > 1e30).astype(jnp.int32)

    return Timed(
        f"{model.name} {product} {tokens} tokens",
        (spec((model.groups, n, k), "bfloat16"),),
        arrays,
        step,
        bytes=active * size + 2.0 * rows * (n + k),
        flops=2.0 * rows * n * k,
        facts=dict(model=model.name, tokens=tokens, product=product, active=active, sets=sets),
    )


def cases(tiny: bool) -> list[Timed]:
    if tiny:
        return [grouped_case(TINY, 3, product) for product in TINY.products]
    wanted = [(QWEN3_30B, tokens) for tokens in (64, 4096, 1, 8, 256, 8192)]
    wanted += [(model, tokens) for model in (GPT_OSS, DEEPSEEK, MIXTRAL) for tokens in (64, 4096)]
    return [grouped_case(model, tokens, product) for model, tokens in wanted for product in model.products]


def run(page: Page) -> None:
    timing.run(page, cases(page.settings.tiny))
