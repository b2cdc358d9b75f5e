# SPDX-License-Identifier: Apache-2.0
"""Runs `decoder.step` like a minimal engine: one fixed shape, and blocks in a scattered order.

Pools start as NaN, so a token that reads a slot before it is written turns its logits into NaN.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.models import decoder, kv_cache
from jaxserve.models.decoder import Params
from jaxserve.models.inputs import ModelInputs, PagedTokens
from jaxserve.models.spec import ModelSpec
from pallas_kernels.ragged import Ragged

run_step = jax.jit(decoder.step, static_argnames="spec", donate_argnames="cache")
run_forward = jax.jit(decoder.forward, static_argnames=("spec", "remat"))


@dataclass
class Row:
    """A sequence: its tokens so far and the blocks that hold their KV."""

    rope_length: int  # the length that length-dependent RoPE assumes
    tokens: list[int] = field(default_factory=list[int])
    blocks: list[int] = field(default_factory=list[int])


class Paged:
    def __init__(
        self,
        spec: ModelSpec,
        params: Params,
        *,
        rows: int = 2,
        tokens: int = 32,
        max_length: int = 64,
        block_size: int = 8,
        dtype: Any = jnp.float32,
        step: Callable[[Params, Any, ModelInputs], Any] | None = None,
    ) -> None:
        self.run = step or partial(run_step, spec)
        self.spec, self.params = spec, params
        self.rows, self.tokens, self.block_size = rows, tokens, block_size
        self.width = -(-max_length // block_size)
        blocks = 1 + rows * self.width
        cache = kv_cache.allocate(spec, blocks=blocks, block_size=block_size, dtype=dtype)
        self.cache = jax.tree.map(partial(jnp.full_like, fill_value=jnp.nan), cache)
        self.free = list(np.random.default_rng(5).permutation(np.arange(1, blocks)))

    def step(self, *work: tuple[Row, list[int]], decode_only: bool = False) -> list[np.ndarray]:
        """Feeds each row its new tokens and returns their logits. Rows with one token must come first."""
        inputs = self.inputs(*work, decode_only=decode_only)
        sizes = [len(new) for _, new in work]
        logits, self.cache = self.run(self.params, self.cache, inputs)
        return np.split(np.asarray(logits)[: sum(sizes)], np.cumsum(sizes)[:-1])

    def inputs(self, *work: tuple[Row, list[int]], decode_only: bool = False) -> ModelInputs:
        size = self.rows if decode_only else self.tokens
        tokens, positions, lengths = (np.zeros(size, np.int32) for _ in range(3))
        slots = np.full(size, -1, np.int32)
        tables = np.zeros((self.rows, self.width), np.int32)
        kv_lens = np.zeros(self.rows, np.int32)
        ends = np.zeros(self.rows + 1, np.int32)
        start = 0
        for i, (row, new) in enumerate(work):
            first = len(row.tokens)
            row.tokens += new
            while len(row.blocks) * self.block_size < len(row.tokens):
                row.blocks.append(int(self.free.pop()))
            at = slice(start, start + len(new))
            where = np.arange(first, len(row.tokens))
            tokens[at], positions[at], lengths[at] = new, where, row.rope_length
            slots[at] = np.asarray(row.blocks)[where // self.block_size] * self.block_size + where % self.block_size
            tables[i, : len(row.blocks)] = row.blocks
            kv_lens[i] = len(row.tokens)
            start += len(new)
            ends[i + 1 :] = start
        if decode_only:  # padding rows have one padding token each
            ends = np.arange(self.rows + 1, dtype=np.int32)
        single = 0
        while single < len(work) and len(work[single][1]) == 1:
            single += 1
        distribution = np.asarray([single, len(work)], np.int32)
        pool = jax.tree.leaves(self.cache[0])[0]
        ragged = Ragged(
            block_tables=tables, kv_lens=kv_lens, cu_q_lens=ends, distribution=distribution, decode_only=decode_only
        )
        ragged.check(tokens=size, blocks=pool.shape[0], block_size=self.block_size)
        return ModelInputs(
            tokens=jnp.asarray(tokens),
            positions=jnp.asarray(positions),
            paged=(PagedTokens(slots=jnp.asarray(slots), ragged=jax.tree.map(jnp.asarray, ragged)),),
            sampled=jnp.arange(size, dtype=jnp.int32),
            rope_lengths=jnp.asarray(lengths) if self.spec.needs_rope_length else None,
        )
