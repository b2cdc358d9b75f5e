# SPDX-License-Identifier: Apache-2.0
"""Loads a model folder into the decoder's parameters, directly into their shardings, one tensor at a time.

Each engine tensor is assembled in one host buffer, transferred to the devices, and freed: beyond parameters that stay
on the host, peak host memory is the largest tensor. On CPU the buffer itself becomes the parameter.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from convert import orbax
from convert.files.reader import Array, OnBytes, Reader, aligned
from convert.gguf import folder as gguf
from convert.plan import LoadPlan, plan
from jaxserve import machine
from jaxserve.errors import CheckpointError, JaxserveError
from jaxserve.models import param_layout, registry
from jaxserve.models.decoder import Params
from jaxserve.models.registry import Family
from jaxserve.models.spec import DTYPES, ModelSpec

__all__ = ["LoadPlan", "load", "load_model", "open_model", "open_spec", "param_dtype", "plan", "read"]


def load_model(folder: str | Path, *, dtype: Any = None, progress: OnBytes | None = None) -> tuple[ModelSpec, Params]:
    """Load the model in `folder`, a Hugging Face or converted folder or a GGUF file, onto the mesh in context.

    `dtype=None` means the checkpoint's dtype, or on a CPU the one that `machine.cpu_dtype` chooses for it.
    """
    opened = open_model(gguf.resolved(Path(folder).expanduser()))
    opened = opened.in_dtype(param_dtype(opened, dtype))
    return opened.spec, read(opened, progress)


def open_spec(folder: Path) -> ModelSpec:
    """Read the model's spec from its config alone; the weights need not exist yet."""
    return orbax.read_spec(folder) if orbax.is_converted(folder) else registry.read_config(folder)[0]


def open_model(folder: Path) -> LoadPlan:
    """Locate every parameter, after all checks that need no tensor data."""
    if orbax.is_converted(folder):
        return orbax.plan(folder)
    return plan(folder, *registry.read_config(folder))


def load(folder: Path, spec: ModelSpec, family: Family, *, dtype: Any, progress: OnBytes | None = None) -> Params:
    """Load the parameters in engine layout onto the mesh in context, as `dtype`."""
    return read(plan(folder, spec, family).in_dtype(dtype), progress)


def param_dtype(plan: LoadPlan, wanted: Any = None) -> Any:
    """The dtype of parameters: `wanted`, or by default the checkpoint's, unless it is slow on this machine's CPU."""
    if wanted is None:
        stored = jnp.dtype(plan.stored_dtype())
        return jnp.dtype(machine.cpu_dtype(stored.name)) if jax.default_backend() == "cpu" else stored
    try:
        dtype = jnp.dtype(wanted)
    except TypeError:
        dtype = None
    if dtype is None or dtype.name not in DTYPES:
        raise JaxserveError(f"unsupported parameter dtype {wanted!r}", f"choose one of {', '.join(DTYPES)}")
    return dtype


def read(plan: LoadPlan, progress: OnBytes | None = None) -> Params:
    """Read the parameters in engine layout onto the mesh in context, as the spec's dtype."""
    params: Params = {}
    with Reader(progress) as reader:
        for path, target in param_layout.leaves(param_layout.abstract_params(plan.spec)):
            host = aligned(target.shape, target.dtype)
            first: Array | None = None
            for part in param_layout.parts_of(path, target.shape, plan.spec):
                into = part.rows_first(host)[part.index].reshape(part.view, copy=False)
                reader.fill(plan.copies(part.path, into, part.source))
                if part.shared:
                    _check_equal(part.path, host, first)
                    first = host.copy()
            param_layout.put(params, path, _to_devices(host, target))
    return params


def _check_equal(path: param_layout.Path, found: Array, first: Array | None) -> None:
    if first is not None and not np.array_equal(found, first):
        problem = f"{param_layout.dotted(path)} differs from that of the weights it is fused with"
        raise CheckpointError(problem, "this checkpoint is not supported")


def _to_devices(host: Array, target: jax.ShapeDtypeStruct) -> jax.Array:
    if target.sharding is None:
        array = jax.device_put(host, may_alias=True)
    else:
        array = jax.make_array_from_callback(target.shape, target.sharding, lambda index: host[index])
    return array.block_until_ready()  # otherwise copies of many tensors accumulate on the host
