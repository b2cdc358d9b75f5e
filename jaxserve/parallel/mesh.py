# SPDX-License-Identifier: Apache-2.0
"""The device mesh, and the one table that says which mesh axis each logical axis of an array is cut along.

Code names axes by meaning ("kv_heads", "mlp"); only RULES knows the mesh. The mesh comes from the context
(`with jax.set_mesh(mesh)`); with none, everything here is a no-op and arrays live on one device. Meshes are
explicit: a sum over a cut axis must say where its result goes, so each collective can be read in the source.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxserve.errors import JaxserveError

AXES = ("data", "stage", "tensor", "expert")

# None: never cut. An axis that is not named here is a mistake, and raises.
RULES: dict[str, str | None] = {
    "batch": "data",
    "vocab": "tensor",
    "kv_heads": "tensor",
    "heads": "tensor",
    "mlp": "tensor",
    "experts": "expert",
    **dict.fromkeys(("hidden", "group", "head_dim", "latent", "parts", "positions", "router", "blocks", "slots")),
}

Axes = tuple[str | None, ...]


def make_mesh(*, data: int = 1, tensor: int = 1, expert: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of data x tensor x expert devices, the first ones unless named. The stage axis has size 1."""
    devices = jax.devices() if devices is None else devices
    sizes = {"data": data, "tensor": tensor, "expert": expert}
    for name, size in sizes.items():
        if not isinstance(size, int) or size < 1:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise JaxserveError(f"the mesh axis {name!r} has size {size!r}", "give a whole number from 1")
    wanted = data * tensor * expert
    if wanted > len(devices):
        product = " x ".join(f"{name} {size}" for name, size in sizes.items())
        raise JaxserveError(f"{product} needs {wanted} devices and there are {len(devices)}", "choose smaller sizes")
    shape = (data, 1, tensor, expert)
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Explicit,) * 4, devices=devices[:wanted])


def check_explicit() -> None:
    """That the mesh in context, if it has axes of ours, is one that computation here can name them in."""
    mesh = jax.sharding.get_abstract_mesh()
    for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True):
        if name in AXES and kind == AxisType.Auto:
            raise JaxserveError(f"the mesh's axis {name!r} is of type Auto", "use make_mesh, or AxisType.Explicit")


def axis_size(name: str) -> int:
    """How many shards the mesh in context cuts this logical axis into."""
    mesh = jax.sharding.get_abstract_mesh()
    axis = RULES[name]
    return mesh.shape[axis] if axis in mesh.axis_names else 1


def shards() -> tuple[int, int]:
    """How many shards the mesh in context cuts heads into, and experts."""
    check_explicit()
    return axis_size("heads"), axis_size("experts")


def in_mesh() -> bool:
    return bool(jax.sharding.get_abstract_mesh().axis_names)


def partition(axes: Axes, names: Sequence[str] | None = None) -> P:
    """The logical axes of an array as mesh axes; those the mesh (by default: in context) lacks are not cut."""
    names = jax.sharding.get_abstract_mesh().axis_names if names is None else names
    cut = (RULES[axis] if axis else None for axis in axes)
    return P(*(axis if axis in names else None for axis in cut))


def named(mesh: Mesh, axes: Axes) -> NamedSharding:
    return NamedSharding(mesh, partition(axes, mesh.axis_names))


def out_sharding(leading: jax.Array, count: int, axes: Axes) -> P | None:
    """For an op's result: the first `count` axes lie as those of `leading`, then these. None without a mesh."""
    return P(*leading_spec(leading, count), *partition(axes)) if in_mesh() else None


def leading_spec(array: jax.Array, count: int) -> tuple[Any, ...]:
    return tuple(jax.typeof(array).sharding.spec)[:count] if in_mesh() else (None,) * count


def replicated(array: jax.Array) -> jax.Array:
    """The whole array on every device: an all-gather of whatever was cut, but for the batch."""
    if not in_mesh():
        return array
    batch = RULES["batch"]
    spec = (axis if axis == batch else None for axis in jax.typeof(array).sharding.spec)
    return jax.sharding.reshard(array, P(*spec))


def island(function: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """`function` on each device's own shards, for kernels, which know no mesh. Plain without a mesh."""
    if not in_mesh():
        return function
    # Pallas calls do not say how their outputs vary over the mesh, hence no check of it.
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def sum_over(array: jax.Array, *axes: str) -> jax.Array:
    """Inside an island: the sum of all shards of these logical axes (an all-reduce)."""
    names = jax.sharding.get_abstract_mesh().axis_names
    cut = tuple(RULES[axis] for axis in axes if RULES[axis] in names)
    return jax.lax.psum(array, cut) if cut else array


def shard_index(axis: str) -> jax.Array | int:
    """Inside an island: which shard of this logical axis runs here."""
    name = RULES[axis]
    return jax.lax.axis_index(name) if name in jax.sharding.get_abstract_mesh().axis_names else 0


def here(axes: Axes) -> NamedSharding | None:
    """The sharding of such an array on the mesh in context; None without one."""
    context = jax.sharding.get_mesh() if in_mesh() else None
    return None if context is None else named(context, axes)


def zeros(like: jax.ShapeDtypeStruct) -> jax.Array:
    """Under jit: zeros of this shape, which on a mesh lie as it says."""
    sharding = like.sharding if in_mesh() else None
    spec = sharding.spec if isinstance(sharding, NamedSharding) else None
    return jnp.zeros(like.shape, like.dtype, out_sharding=spec)
