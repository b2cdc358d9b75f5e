# SPDX-License-Identifier: Apache-2.0
"""What one step of serving gives the decoder: a ragged batch over paged KV, as fixed-shape arrays."""

from dataclasses import dataclass, field

import jax


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class ModelInputs:
    """T tokens of R rows. All int32. Every id must have been checked on the host: jax does not."""

    tokens: jax.Array  # [T]
    positions: jax.Array  # [T]
    slots: jax.Array  # [T]  block * block_size + offset of the token's KV; negative: padding, written nowhere
    block_tables: jax.Array  # [R, width]
    kv_lens: jax.Array  # [R]  the new tokens included
    cu_q_lens: jax.Array  # [R + 1]
    distribution: jax.Array  # [2]  decode rows, rows
    sampled: jax.Array  # [S]  the tokens whose logits are wanted
    # [T]  how long the token's sequence is taken to be, constant for a request's life; where spec.needs_rope_length
    rope_lengths: jax.Array | None = None
    decode_only: bool = field(default=False, metadata=dict(static=True))
