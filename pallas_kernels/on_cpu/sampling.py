# SPDX-License-Identifier: Apache-2.0
"""Sampling on CPUs: `row_sampler` on whole rows, all rows side by side."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.row_sampler import Mode, RowParams, SamplingCall, one_row
from pallas_kernels.row_search import FoldStep, LogitsRow

_PIVOTS = 4  # on a CPU each pivot costs a pass

# Log probability and rank of the token, the most likely tokens and theirs.
type Likely = tuple[jax.Array, jax.Array, jax.Array, jax.Array]


def sample(
    call: SamplingCall, logits: jax.Array, raw_logits: jax.Array | None, params: RowParams | jax.Array
) -> tuple[jax.Array, jax.Array, Likely | None]:
    """Tokens, validity and log probabilities of all rows; `params` are the tokens themselves if those are given.

    `call.mode` is what the rows may ask for. What they do ask for decides at run time: a search for thresholds takes
    about thirty times as long as a maximum.
    """
    if call.given or call.mode == "greedy" or not isinstance(params, RowParams):
        return _sample(call, logits, raw_logits, params)
    random = params.temperature > 0
    kinds = [random, params.filtered()] if call.mode == "filtered" else [random]
    modes: tuple[Mode, ...] = ("greedy", "random", "filtered")[: 1 + len(kinds)]
    asked = sum(jnp.any(kind).astype(jnp.int32) for kind in kinds)
    branches = [partial(_sample, call._replace(mode=mode)) for mode in modes]
    return lax.switch(asked, branches, logits, raw_logits, params)


def _sample(
    call: SamplingCall, logits: jax.Array, raw_logits: jax.Array | None, params: RowParams | jax.Array
) -> tuple[jax.Array, jax.Array, Likely | None]:
    ids = jnp.arange(logits.shape[1], dtype=jnp.int32)

    def as_row(x: jax.Array) -> LogitsRow:
        def fold(step: FoldStep, *initial: jax.Array, enabled: Any = True) -> tuple[jax.Array, ...]:
            del enabled  # rows run side by side, so none can skip a pass
            return step(tuple(jnp.full(x.shape, value, value.dtype) for value in initial), x, ids)

        return LogitsRow(x.shape[0], fold, lambda token: x[token], in_lanes=False)

    def one(
        x: jax.Array, raw: jax.Array | None, row_params: RowParams | jax.Array
    ) -> tuple[jax.Array, jax.Array, Likely | None]:
        raw_row = None if raw is None else as_row(raw.astype(jnp.float32))
        token, valid, row, survivors, likely = one_row(
            call, as_row(x.astype(jnp.float32)), raw_row, row_params, pivots=_PIVOTS
        )
        if likely is None:
            return token, valid, None
        values = row.fold(lambda acc, x, ids: (jnp.where(survivors.keep(x, ids), x, -jnp.inf),), jnp.float32(0))[0]
        best, top = lax.top_k(values, call.top_n)
        exists = best > -jnp.inf
        top_tokens = jnp.where(exists, top.astype(jnp.int32), -1)
        return (
            token,
            valid,
            (likely.logprob, likely.rank, top_tokens, jnp.where(exists, likely.normalizer(best), -jnp.inf)),
        )

    return jax.vmap(one)(logits, raw_logits, params)
