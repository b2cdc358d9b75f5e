# SPDX-License-Identifier: Apache-2.0
"""The device mesh, and the table that maps logical array axes to mesh axes.

Code names axes by meaning ("kv_heads", "mlp"); only RULES refers to mesh axes. The mesh comes from the context
(`with jax.set_mesh(mesh)`); without one, everything here is a no-op and arrays live on one device. Axis types are
Explicit: a sum over a sharded axis must state its output sharding, so every collective is visible in the source.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxserve.errors import JaxserveError

AXES = ("data", "stage", "tensor", "expert")

# None: never sharded. An axis that is missing here is a bug and raises KeyError.
RULES: dict[str, str | None] = {
    "batch": "data",
    "vocab": "tensor",
    "kv_heads": "tensor",
    "heads": "tensor",
    "mlp": "tensor",
    "experts": "expert",
    **dict.fromkeys(("hidden", "group", "head_dim", "latent", "parts", "positions", "router", "blocks", "slots")),
    "columns": None,
}

Axes = tuple[str | None, ...]


def make_mesh(*, data: int = 1, tensor: int = 1, expert: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of data x tensor x expert devices (default: the first ones). The stage axis has size 1."""
    devices = jax.devices() if devices is None else devices
    sizes = {"data": data, "tensor": tensor, "expert": expert}
    for name, size in sizes.items():
        if not isinstance(size, int) or size < 1:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise JaxserveError(f"mesh axis {name!r} has size {size!r}", "use a positive integer")
    wanted = data * tensor * expert
    if wanted > len(devices):
        product = " x ".join(f"{name} {size}" for name, size in sizes.items())
        raise JaxserveError(f"{product} needs {wanted} devices but only {len(devices)} exist", "choose smaller sizes")
    shape = (data, 1, tensor, expert)
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Explicit,) * 4, devices=devices[:wanted])


def check_explicit() -> None:
    """Check that none of our axes has type Auto in the mesh in context."""
    mesh = jax.sharding.get_abstract_mesh()
    for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True):
        if name in AXES and kind == AxisType.Auto:
            raise JaxserveError(f"mesh axis {name!r} is of type Auto", "use make_mesh, or AxisType.Explicit")


def axis_size(name: str) -> int:
    """The number of shards of this logical axis on the mesh in context."""
    mesh = jax.sharding.get_abstract_mesh()
    axis = RULES[name]
    return mesh.shape[axis] if axis in mesh.axis_names else 1


def shards() -> tuple[int, int]:
    """The number of shards of heads and of experts on the mesh in context."""
    check_explicit()
    return axis_size("heads"), axis_size("experts")


def in_mesh() -> bool:
    return bool(jax.sharding.get_abstract_mesh().axis_names)


def partition(axes: Axes, names: Sequence[str] | None = None) -> P:
    """The PartitionSpec of logical axes. Axes that the mesh (default: the one in context) lacks are not sharded."""
    names = jax.sharding.get_abstract_mesh().axis_names if names is None else names
    cut = (RULES[axis] if axis else None for axis in axes)
    return P(*(axis if axis in names else None for axis in cut))


def named(mesh: Mesh, axes: Axes) -> NamedSharding:
    return NamedSharding(mesh, partition(axes, mesh.axis_names))


def out_sharding(leading: jax.Array, count: int, axes: Axes) -> P | None:
    """An op's output sharding: the first `count` axes as in `leading`, then `axes`. None without a mesh."""
    return P(*leading_spec(leading, count), *partition(axes)) if in_mesh() else None


def leading_spec(array: jax.Array, count: int) -> tuple[Any, ...]:
    return tuple(jax.typeof(array).sharding.spec)[:count] if in_mesh() else (None,) * count


def replicated(array: jax.Array) -> jax.Array:
    """The array replicated on every device (an all-gather), except for the batch axis."""
    if not in_mesh():
        return array
    batch = RULES["batch"]
    spec = (axis if axis == batch else None for axis in jax.typeof(array).sharding.spec)
    return jax.sharding.reshard(array, P(*spec))


def island(function: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """`function` under shard_map, for kernels, which see only local shards. Unchanged without a mesh."""
    if not in_mesh():
        return function
    # Pallas calls do not declare how outputs vary over the mesh, hence check_vma=False.
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def sum_over(array: jax.Array, *axes: str) -> jax.Array:
    """Inside an island: the sum over all shards of these logical axes (an all-reduce)."""
    names = jax.sharding.get_abstract_mesh().axis_names
    cut = tuple(RULES[axis] for axis in axes if RULES[axis] in names)
    return jax.lax.psum(array, cut) if cut else array


def shard_index(axis: str) -> jax.Array | int:
    """Inside an island: this device's shard index along the logical axis."""
    name = RULES[axis]
    return jax.lax.axis_index(name) if name in jax.sharding.get_abstract_mesh().axis_names else 0


def here(axes: Axes) -> NamedSharding | None:
    """The NamedSharding of an array with these axes on the mesh in context; None without a mesh."""
    context = jax.sharding.get_mesh() if in_mesh() else None
    return None if context is None else named(context, axes)


def zeros(like: jax.ShapeDtypeStruct) -> jax.Array:
    """Under jit: zeros of this shape, with its sharding on a mesh."""
    sharding = like.sharding if in_mesh() else None
    spec = sharding.spec if isinstance(sharding, NamedSharding) else None
    return jnp.zeros(like.shape, like.dtype, out_sharding=spec)
