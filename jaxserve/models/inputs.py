# SPDX-License-Identifier: Apache-2.0
"""The decoder's input in one serving step: a ragged batch over paged KV, as arrays of fixed shape."""

from dataclasses import dataclass, field

import jax

from jaxserve.models.cache_groups import Groups
from pallas_kernels.ragged import Ragged


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class PagedTokens:
    """Where the layers of one cache group keep the KV of the tokens, and of those before them."""

    slots: jax.Array  # [T]  block * block_size + offset of the token's KV; negative for padding, which is not written
    ragged: Ragged  # the rows of these tokens, with the group's block tables


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class ModelInputs:
    """T tokens. All arrays are int32, and JAX does not check ids: check them on the host."""

    tokens: jax.Array  # [T]
    positions: jax.Array  # [T]
    paged: tuple[PagedTokens, ...]  # for each cache group
    sampled: jax.Array  # [S]  indices of the tokens that need logits
    # [T]  the length that length-dependent RoPE assumes for the token's sequence, constant over a request's life; None
    # unless spec.needs_rope_length
    rope_lengths: jax.Array | None = None
    rows: jax.Array | None = None  # [R]  for recurrent layers: the row whose state each row of the batch continues
    groups: Groups | None = field(default=None, metadata=dict(static=True))  # of the layers; None: all in one
