# SPDX-License-Identifier: Apache-2.0
"""Which implementation of an op runs; the only module that knows platforms and Pallas dialects.

kernel     the Pallas kernel, compiled for a GPU (Triton dialect)
interpret  the same kernel in Pallas' interpreter, on any platform; slow, for tests
cpu        the jax.numpy code of `on_cpu`, on any platform

An op chooses when it is traced: the kernel if the default device is a GPU, else the CPU code, unless `use(...)` forces
one. The choice is part of the traced program, so a function that was jitted under one choice keeps it.

Inside `jax.shard_map` the ops need `check_vma=False`, because Pallas calls do not declare how their outputs vary over
the mesh.
"""

import contextlib
import contextvars
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

type Implementation = Literal["kernel", "interpret", "cpu"]

_forced: contextvars.ContextVar[Implementation | None] = contextvars.ContextVar("implementation", default=None)


def implementation() -> Implementation:
    """The implementation of an op that is traced now."""
    forced = _forced.get()
    if forced is not None:
        return forced
    chosen = jax.config.jax_default_device  # set by `with jax.default_device(...)`: a device or a platform name
    platform = jax.default_backend() if chosen is None else getattr(chosen, "platform", chosen)
    return "kernel" if platform in ("gpu", "cuda") else "cpu"


@contextlib.contextmanager
def use(choice: Implementation) -> Iterator[None]:
    """Force an implementation for every op traced inside the block."""
    if choice not in ("kernel", "interpret", "cpu"):
        raise ValueError(f"implementation is {choice!r}, expected 'kernel', 'interpret' or 'cpu'")
    token = _forced.set(choice)
    try:
        yield
    finally:
        _forced.reset(token)


def device_kind() -> str:
    """Name of the device to compile for, such as "NVIDIA H200"; a key of the tile table."""
    abstract = jax.sharding.get_abstract_mesh().abstract_device
    return abstract.device_kind if abstract is not None else jax.devices()[0].device_kind


def whole(array: jax.Array | jax.ShapeDtypeStruct) -> pl.BlockSpec:
    """Pass the whole array to a kernel: in this dialect that is a pointer, and nothing is copied."""
    ndim = len(array.shape)
    return pl.BlockSpec(array.shape, lambda *_: (0,) * ndim)


def kernel_call(
    kernel: Callable[..., None],
    *,
    grid: Sequence[int],
    inputs: dict[str, jax.Array],
    outputs: Sequence[jax.ShapeDtypeStruct],
    aliases: dict[str, int] | None = None,
    num_warps: int,
    num_stages: int,
    name: str,
) -> list[Any]:
    """Run `kernel(refs: dict, *output_refs)` over the grid; every ref is a whole array.

    `aliases` maps the name of an input to the position of the output that shares its memory. The first axis of the
    grid may have 2^31 - 1 programs, the other two 65535.
    """
    if any(size > limit for size, limit in zip(grid[1:], (65535, 65535), strict=False)):
        raise ValueError(f"{name}: grid {tuple(grid)} exceeds (2147483647, 65535, 65535)")
    if math.prod(grid) == 0:
        raise ValueError(f"{name}: grid {tuple(grid)} is empty")

    def named(*refs: Any) -> None:
        kernel(*refs)

    named.__name__ = name  # the name in profiles and compiler dumps
    order = sorted(inputs)  # the order in which a dict is flattened
    return pl.pallas_call(
        named,
        grid=tuple(grid),
        in_specs=[{key: whole(inputs[key]) for key in order}],
        out_specs=[whole(shape) for shape in outputs],
        out_shape=list(outputs),
        input_output_aliases={order.index(key): out for key, out in (aliases or {}).items()},
        compiler_params=plt.CompilerParams(num_warps=num_warps, num_stages=num_stages),
        interpret=implementation() == "interpret",
        name=name,
    )(inputs)
