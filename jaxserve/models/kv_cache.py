# SPDX-License-Identifier: Apache-2.0
"""The paged KV cache: one dict of pools per layer, so that each is donated, aliased and updated in place alone.

{"k", "v"}: [blocks, block_size, kv_heads, head_dim]; {"latent"}: [blocks, block_size, kv_rank + rope_dim].
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxserve.models.mesh_fit import Fit, fit
from jaxserve.models.spec import LatentAttention, Layer, ModelSpec
from jaxserve.parallel import mesh
from pallas_kernels.block_copy import copy_blocks

LayerCache = dict[str, jax.Array]

_AXES: dict[str, mesh.Axes] = {
    "k": ("blocks", "slots", "kv_heads", "head_dim"),
    "v": ("blocks", "slots", "kv_heads", "head_dim"),
    "latent": ("blocks", "slots", "latent"),
}


def layer_shapes(layer: Layer, fitted: Fit, *, blocks: int, block_size: int) -> dict[str, tuple[int, ...]]:
    attention = layer.attention
    if isinstance(attention, LatentAttention):
        return {"latent": (blocks, block_size, attention.kv_rank + attention.rope_dim)}
    shape = (blocks, block_size, attention.kv_heads * fitted.kv_repeat, attention.head_dim)
    return {"k": shape, "v": shape}


def bytes_per_block(spec: ModelSpec, *, block_size: int, dtype: Any) -> int:
    """Over all layers and all devices together."""
    fitted = fit(spec)
    shapes = (layer_shapes(layer, fitted, blocks=1, block_size=block_size) for layer in spec.layers)
    return sum(math.prod(shape) for pools in shapes for shape in pools.values()) * jnp.dtype(dtype).itemsize


def abstract_cache(
    spec: ModelSpec, *, blocks: int, block_size: int, dtype: Any
) -> list[dict[str, jax.ShapeDtypeStruct]]:
    """Shapes, with shardings where a mesh is in context."""
    fitted = fit(spec)
    return [
        {
            name: jax.ShapeDtypeStruct(shape, dtype, sharding=mesh.here(_AXES[name]))
            for name, shape in layer_shapes(layer, fitted, blocks=blocks, block_size=block_size).items()
        }
        for layer in spec.layers
    ]


def allocate(spec: ModelSpec, *, blocks: int, block_size: int, dtype: Any) -> list[LayerCache]:
    """Zeroed pools, made on the devices: the host never holds one."""
    return jax.jit(partial(zeros, spec, blocks=blocks, block_size=block_size, dtype=dtype))()


def zeros(spec: ModelSpec, *, blocks: int, block_size: int, dtype: Any) -> list[LayerCache]:
    """`allocate`, to be jitted by the caller."""
    fitted = fit(spec)

    def pool(name: str, shape: tuple[int, ...]) -> jax.Array:
        return jnp.zeros(shape, dtype, out_sharding=mesh.partition(_AXES[name]) if mesh.in_mesh() else None)

    shapes = (layer_shapes(layer, fitted, blocks=blocks, block_size=block_size) for layer in spec.layers)
    return [{name: pool(name, shape) for name, shape in of_layer.items()} for of_layer in shapes]


def move_blocks(cache: list[LayerCache], sources: jax.Array, destinations: jax.Array) -> list[LayerCache]:
    """Copies whole blocks in every layer; see block_copy. The caller's jit should donate the cache."""

    def move(name: str, pool: jax.Array) -> jax.Array:
        cut = mesh.partition(_AXES[name])
        return mesh.island(copy_blocks, (cut, P(), P()), cut)(pool, sources, destinations)

    return [{name: move(name, pool) for name, pool in pools.items()} for pools in cache]
