# SPDX-License-Identifier: Apache-2.0
"""The paged KV cache: one dict of pools per layer of a cache group (cache_groups.py), so that each pool is donated and
updated in place separately. One layer of every group writes to each dict, in its group's blocks.

Recurrent layers have a dict of states instead: an array [rows, ...] for each part of the state.

{"k", "v"}: [blocks, block_size, kv_heads, head_dim]; {"latent"}: [blocks, block_size, kv_rank + rope_dim]. Pools of one
byte per value also have {"k_scale", "v_scale"}: float32 [blocks, block_size, kv_heads].
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxserve.models.cache_groups import Groups, one_group
from jaxserve.models.mesh_fit import fit
from jaxserve.models.spec import Layer, ModelSpec, Recurrent
from jaxserve.parallel import mesh
from pallas_kernels.block_copy import copy_blocks

LayerCache = dict[str, jax.Array]

SCALES = ("k_scale", "v_scale")

_AXES: dict[str, mesh.Axes] = {
    "k": ("blocks", "slots", "kv_heads", "head_dim"),
    "v": ("blocks", "slots", "kv_heads", "head_dim"),
    "latent": ("blocks", "slots", "latent"),
    **dict.fromkeys(SCALES, ("blocks", "slots", "kv_heads")),
}


def abstract_cache(
    spec: ModelSpec, *, blocks: int, block_size: int, dtype: Any, groups: Groups | None = None, rows: int = 1
) -> list[dict[str, jax.ShapeDtypeStruct]]:
    """The shapes of pools and of states for `rows` sequences, sharded if a mesh is in context. Without `groups` all
    layers are in one."""
    fitted = fit(spec, *mesh.shards())

    def arrays(layer: Layer) -> dict[str, jax.ShapeDtypeStruct]:
        if isinstance(layer.attention, Recurrent):
            return {
                part.name: jax.ShapeDtypeStruct((rows, *part.shape), jnp.dtype(part.dtype), sharding=mesh.here(()))
                for part in layer.attention.state
            }
        pools = {name: (slot, jnp.dtype(dtype)) for name, slot in fitted.slots(layer).items()}
        if jnp.dtype(dtype).itemsize == 1:
            pools |= {f"{name}_scale": (slot[:1], jnp.dtype(jnp.float32)) for name, (slot, _) in pools.items()}
        return {
            name: jax.ShapeDtypeStruct((blocks, block_size, *slot), of, sharding=mesh.here(_AXES[name]))
            for name, (slot, of) in pools.items()
        }

    return [arrays(spec.layers[layer]) for layer in (groups or one_group(spec)).layers()]


def allocate(
    spec: ModelSpec, *, blocks: int, block_size: int, dtype: Any, groups: Groups | None = None
) -> list[LayerCache]:
    """Zeroed pools, created directly on the devices."""
    shapes = abstract_cache(spec, blocks=blocks, block_size=block_size, dtype=dtype, groups=groups)
    return jax.jit(lambda: jax.tree.map(mesh.zeros, shapes))()


def block_size(cache: list[LayerCache]) -> int:
    """The number of slots in a block of these pools."""
    return next(iter(cache[0].values())).shape[1]


def move_blocks(cache: list[LayerCache], sources: jax.Array, destinations: jax.Array) -> list[LayerCache]:
    """Copy whole blocks in every layer; see block_copy. The caller's jit should donate the cache."""

    def move(name: str, pool: jax.Array) -> jax.Array:
        if name not in _AXES:
            return pool
        cut = mesh.partition(_AXES[name])
        return mesh.island(copy_blocks, (cut, P(), P()), cut)(pool, sources, destinations)

    return [{name: move(name, pool) for name, pool in pools.items()} for pools in cache]


def copy_states(cache: list[LayerCache], sources: jax.Array, destinations: jax.Array) -> list[LayerCache]:
    """Copy the states of whole rows, all at once; negative rows are padding."""

    def copy(state: jax.Array, sources: jax.Array, destinations: jax.Array) -> jax.Array:
        rows = jnp.where(destinations < 0, state.shape[0], destinations)
        return state.at[rows].set(state.at[sources].get(mode="clip"), mode="drop")

    run = mesh.island(copy, (P(), P(), P()), P())
    return [
        {name: array if name in _AXES else run(array, sources, destinations) for name, array in arrays.items()}
        for arrays in cache
    ]
