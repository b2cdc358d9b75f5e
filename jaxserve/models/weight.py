# SPDX-License-Identifier: Apache-2.0
"""Declares the parameters of flax modules: arrays with logical axis names, which parallel.mesh maps to mesh axes.

A weight, which activations are multiplied by, is one array [*outs, *ins], or several if the spec has a scheme for it:
then `store` puts Components in its place, with a parameter for each. A module reads neither: it passes the weight to
linear.py.
"""

import math
from collections.abc import Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import nnx

from jaxserve.errors import JaxserveError
from jaxserve.models.mesh_fit import Fit
from jaxserve.models.spec import ModelSpec
from jaxserve.parallel import mesh
from jaxserve.quant.kinds import KINDS
from jaxserve.quant.scheme import Component, Scheme
from jaxserve.quant.tensor import QuantTensor

AxisSizes = Mapping[str, int]  # logical axis -> size, in order
Path = tuple[str | int, ...]


def param(sizes: AxisSizes, dtype: Any) -> nnx.Param[jax.Array]:
    # Decoders are only built abstractly, so nothing is allocated here.
    return nnx.Param(jnp.zeros(tuple(sizes.values()), dtype), axes=tuple(sizes))


def weight(outs: AxisSizes, ins: AxisSizes, dtype: Any) -> "nnx.Param[jax.Array] | Components":
    """A parameter [*outs, *ins] that activations are multiplied by."""
    sizes = {**outs, **ins}
    return nnx.Param(jnp.zeros(tuple(sizes.values()), dtype), axes=tuple(sizes), ins=len(ins))


class Components(nnx.Module):
    """A weight in several arrays: the parameters of its scheme's components, by name."""

    def __init__(self, scheme: Scheme, outs: AxisSizes, ins: AxisSizes) -> None:
        self.scheme, self.outs, self.ins = scheme, tuple(outs), tuple(ins)
        self.experts = self.outs[0] == "experts"
        for component in scheme.components:
            setattr(self, component.name, param(self._sizes(component, outs, ins), component.dtype))

    def _sizes(self, component: Component, outs: AxisSizes, ins: AxisSizes) -> AxisSizes:
        lead = {name: size for name, size in outs.items() if name == "experts"}
        rows = {name: size for name, size in outs.items() if component.rows and name not in lead}
        columns: dict[str, int] = {}
        if component.columns is not None:
            # The axes `ins` are flattened; only the first can be sharded.
            axis = "columns" if component.whole else self.ins[0]
            columns[axis] = math.prod(ins.values()) // component.columns
        return lead | columns | rows if component.columns_first else lead | rows | columns

    def _each(self) -> dict[str, nnx.Param[jax.Array]]:
        return {component.name: getattr(self, component.name) for component in self.scheme.components}

    def tensor(self) -> QuantTensor:
        arrays = {name: held[...] for name, held in self._each().items()}
        return KINDS[self.scheme.kind](arrays, self.scheme, self.experts)

    def cut(self) -> Any:
        """How `tensor` is sharded, as a tree of the same structure."""
        cuts: Any = {name: mesh.partition(held.get_metadata()["axes"]) for name, held in self._each().items()}
        return KINDS[self.scheme.kind](cuts, self.scheme, self.experts)


Weight = nnx.Param[jax.Array] | Components


def store(module: nnx.Module, spec: ModelSpec, fitted: Fit) -> None:
    """Replace each weight that the spec has a scheme for by its components."""
    declared: list[tuple[Path, nnx.Param[jax.Array]]] = [
        (cast(Path, path), node)
        for path, node in nnx.iter_graph(module)
        if isinstance(node, nnx.Param) and "ins" in node.get_metadata()
    ]
    for path, node in declared:
        if (scheme := scheme_at(spec, path)) is None:
            continue
        about = node.get_metadata()
        sizes = dict(zip(about["axes"], node.get_value().shape, strict=True))
        split = len(sizes) - about["ins"]
        outs, ins = (dict(list(sizes.items())[part]) for part in (slice(split), slice(split, None)))
        _check_cut(path, scheme, ins, fitted)
        parent: Any = module
        for key in path[:-1]:
            parent = parent[key] if isinstance(key, int) else getattr(parent, str(key))
        setattr(parent, str(path[-1]), Components(scheme, outs, ins))


def _check_cut(path: Path, scheme: Scheme, ins: AxisSizes, fitted: Fit) -> None:
    name = ".".join(map(str, path))
    if scheme.kind not in KINDS:
        raise JaxserveError(
            f"{name} is quantized as {scheme.kind!r}, which is not supported", "use a version of jaxserve that has it"
        )
    columns = math.prod(ins.values())
    shards = fitted.shards if mesh.RULES[next(iter(ins))] == "tensor" else 1
    for component in scheme.components:
        shared = component.columns or 1
        if columns % shared:
            problem = f"{name} has {columns} columns, which groups of {shared} ({component.name}) do not divide"
            raise JaxserveError(problem, "use another checkpoint")
        if not component.whole and columns // shards % shared:
            problem = f"{name} has {columns // shards} columns on each of {shards} tensor shards"
            problem += f", which groups of {shared} ({component.name}) do not divide"
            raise JaxserveError(problem, "use a smaller tensor_parallel_size")


# --- which weights have components ----------------------------------------------------------------------------------

_FUSED = {"qkv": ("q", "k", "v"), "gate_up": ("gate", "up")}


def public_paths(path: Path) -> list[Path]:
    """The public tensors that are fused into the engine's tensor at this path."""
    if len(path) < 2 or path[-2] not in _FUSED:
        return [path]
    return [(*path[:-2], name, path[-1]) for name in _FUSED[str(path[-2])]]


def scheme_at(spec: ModelSpec, path: Path) -> Scheme | None:
    """How the public or engine tensor at this path is stored; None: as one array."""
    paths = public_paths(path)
    schemes = {spec.scheme_of(each) for each in paths}
    if len(schemes) > 1:
        names = ", ".join(".".join(map(str, each)) for each in paths)
        raise JaxserveError(f"{names} are quantized in different ways", "quantize them alike: the engine fuses them")
    return schemes.pop()


def component_at(spec: ModelSpec, path: Path) -> Component | None:
    """The component that the array at this public or engine path is; None if it is a whole tensor."""
    if not spec.quantized or len(path) < 2:
        return None
    *above, name = path
    scheme = scheme_at(spec, tuple(above))
    return next((each for each in scheme.components if each.name == name), None) if scheme else None
