# SPDX-License-Identifier: Apache-2.0
"""The states of a recurrent layer's rows in one step: read before its tokens, written after them.

A row's state is that of its sequence after all tokens computed so far. A row whose first token is computed begins with
zeros, whatever another sequence left there.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxserve.models.kv_cache import LayerCache
from jaxserve.parallel import mesh
from pallas_kernels.ragged import Ragged


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Stateful:
    rows: jax.Array  # [R]  the row of each row of the batch; padding lies beyond the last
    ragged: Ragged  # how many tokens each has
    states: LayerCache

    def before(self) -> LayerCache:
        """The states [R, ...] before these tokens."""

        def read(states: LayerCache, rows: jax.Array, ragged: Ragged) -> LayerCache:
            ends = jnp.asarray(ragged.cu_q_lens)
            begins = ragged.kv_lens == ends[1:] - ends[:-1]

            def of(state: jax.Array) -> jax.Array:
                found = state.at[rows].get(mode="clip")
                return jnp.where(begins.reshape(-1, *(1,) * (found.ndim - 1)), 0, found)

            return {name: of(state) for name, state in states.items()}

        return mesh.island(read, (P(), P(), P()), P())(self.states, self.rows, self.ragged)

    def after(self, new: LayerCache) -> LayerCache:
        """All states, with those of the batch replaced by `new` [R, ...]."""

        def write(states: LayerCache, rows: jax.Array, new: LayerCache) -> LayerCache:
            return {name: state.at[rows].set(new[name], mode="drop") for name, state in states.items()}

        return mesh.island(write, (P(), P(), P()), P())(self.states, self.rows, new)
