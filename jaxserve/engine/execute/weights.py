# SPDX-License-Identifier: Apache-2.0
"""Parameters on their way into an engine and out of it, one engine tensor at a time.

    conversions    how each tensor of the engine comes from given arrays; checks them all, and compiles what is needed
    as_engine      given parameters in engine layout
    as_public      an engine's parameters in public layout

Arrays that are already as wanted are not copied. A program is compiled for each shape, not for each layer, and kept for
later calls, so that an update or a copy compiles only the first time. It may be compiled in another thread than the
engine's: steps do not wait for it.
"""

import math
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from jaxserve.errors import JaxserveError
from jaxserve.models import online, param_layout
from jaxserve.models.decoder import Params
from jaxserve.models.param_layout import Path, TensorPart
from jaxserve.models.spec import ModelSpec
from jaxserve.models.weight import component_at

type Parts = tuple[TensorPart, ...]


@dataclass(frozen=True, slots=True)
class Conversion:
    """How one tensor of the engine comes from given arrays, which are of the right shapes."""

    path: Path
    target: jax.ShapeDtypeStruct  # with its sharding
    pieces: tuple[Any, ...]
    program: Any = None  # joins the pieces, which it takes where `places` says; None: the only piece is the tensor
    places: tuple[Any, ...] = ()

    @property
    def size(self) -> int:
        """The bytes per device of what it computes."""
        return 0 if self.program is None else shard_bytes(self.target)

    def run(self) -> jax.Array:
        """The tensor, computed and in place."""
        try:
            tensor = self.pieces[0] if self.program is None else self.program(*map(_put, self.pieces, self.places))
            return _put(tensor, self.target.sharding).block_until_ready()
        except jax.errors.JaxRuntimeError as error:
            if not _of_memory(error):
                raise
            name, size = param_layout.dotted(self.path), shard_bytes(self.target)
            problem = f"{name} needs {size:,} bytes per device beside the parameters in use and the given ones: {error}"
            raise JaxserveError(problem, "free memory on the devices, or lower gpu_memory_utilization") from None


def conversions(spec: ModelSpec, params: Params, on: Any, *, device: Any = None) -> list[Conversion]:
    """How to make every tensor of an engine on the mesh `on`, or the single device; the largest first.

    The parameters may be in public or engine layout, on other devices, or on the host. Raises an error that names the
    tensor if they are not of this model, or if one was deleted. They become the spec's dtype.
    """
    with jax.set_mesh(on):
        given = online.encoded(spec, leaves_of(spec, params))
        where = None if on is not None else SingleDeviceSharding(device or jax.devices()[0])
        targets = _targets(spec, where)
        if targets.keys() == given.keys():
            found = [_as_given(path, given[path], target, on) for path, target in targets.items()]
        else:
            _check_not_engine(spec, given.keys(), targets)
            stored = param_layout.with_dtype_of(spec, given)
            param_layout.check_public(spec, given, targets if stored == spec else _targets(stored, where))
            found = []
            for path, target in targets.items():
                parts = param_layout.parts_of(path, target.shape, spec)
                found.append(_conversion(path, target, parts, tuple(given[part.path] for part in parts), on))
    return sorted(found, key=lambda each: -each.size)


def as_engine(spec: ModelSpec, params: Params, on: Any, *, device: Any = None) -> Params:
    """The parameters in engine layout, on the mesh or the single device."""
    engine: Params = {}
    for each in conversions(spec, params, on, device=device):
        param_layout.put(engine, each.path, each.run())
    return engine


def as_public(spec: ModelSpec, engine: Params, on: Any, *, copy: bool) -> Params:
    """The parameters in public layout, on the engine's devices, and replicated on a mesh.

    copy=False: without copies of those that are the engine's own arrays; the caller must not donate or delete them.
    """
    public: Params = {}
    for path, array in param_layout.leaves(engine):
        named = param_layout.parts_of(path, array.shape, spec)
        parts = _nameless(named)
        if not copy and array.sharding.is_fully_replicated and _is_whole(parts, array.shape):
            values = [array]
        else:
            try:
                values = jax.block_until_ready(_splitting(parts, shapes_of(array), on)(array))
            except jax.errors.JaxRuntimeError as error:
                if not _of_memory(error):
                    raise
                problem = f"there is no memory for a copy of the parameters beside the engine's: {error}"
                raise JaxserveError(problem, "lower gpu_memory_utilization, or set copy=False") from None
        for part, value in zip(named, values, strict=True):
            param_layout.put(public, part.path, value)
    return public


def device_of(params: Params) -> Any:
    """The device of parameters, or of their shapes, that are not on a mesh."""
    return next(iter(jax.tree.leaves(params)[0].sharding.device_set))


def shapes_of(arrays: Any) -> Any:
    """The arrays' shapes, dtypes and shardings, enough to compile with."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), arrays)


def largest_joined(spec: ModelSpec, shapes: Params) -> int:
    """The bytes per device that converting one tensor of public layout needs at most."""
    found = param_layout.leaves(shapes)
    joined = (leaf for path, leaf in found if len(param_layout.parts_of(path, leaf.shape, spec)) > 1)
    return max(map(shard_bytes, joined), default=0)


def shard_bytes(leaf: Any) -> int:
    """The bytes per device of an array or its shape."""
    shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
    return math.prod(shape) * leaf.dtype.itemsize


# --- what is given --------------------------------------------------------------------------------------------------


def leaves_of(spec: ModelSpec, params: object) -> dict[Path, Any]:
    """The arrays of a tree in either layout. Only components of quantized weights may be integers."""
    if not isinstance(params, Mapping):
        problem = f"the parameters are of type {type(params).__name__}"
        raise JaxserveError(problem, "pass a dict, as returned by load_model")
    found = dict(param_layout.leaves(params))
    for path, leaf in found.items():
        floats = jnp.issubdtype(getattr(leaf, "dtype", object), jnp.floating)
        if not hasattr(leaf, "shape") or not (floats or component_at(spec, path)):
            kind = getattr(leaf, "dtype", type(leaf).__name__)
            raise JaxserveError(f"{param_layout.dotted(path)} is {kind}", "pass floating-point arrays")
        if not isinstance(leaf, jax.Array):  # float64 becomes float32, as everywhere in jax
            found[path] = np.asarray(leaf, jax.dtypes.canonicalize_dtype(leaf.dtype))
        elif leaf.is_deleted():
            raise JaxserveError(f"{param_layout.dotted(path)} was deleted or donated", "pass arrays that still exist")
    return found


def _targets(spec: ModelSpec, where: Any) -> dict[Path, jax.ShapeDtypeStruct]:
    """The engine layout for the mesh in context, or with the sharding `where`."""
    found = param_layout.leaves(param_layout.abstract_params(spec))
    return {path: leaf if where is None else leaf.update(sharding=where) for path, leaf in found}


def _check_not_engine(spec: ModelSpec, given: Set[Path], targets: Mapping[Path, Any]) -> None:
    """Raises if the paths are nearly those of engine layout, with an error in terms of that layout."""
    public = {part.path for path, leaf in targets.items() for part in param_layout.parts_of(path, leaf.shape, spec)}
    if not given & (targets.keys() - public):
        return
    for path in targets.keys() - given:
        raise JaxserveError(
            f"the parameters have no {param_layout.dotted(path)}", "pass the complete tree in engine layout"
        )
    for path in given - targets.keys():
        raise JaxserveError(f"the model has no parameter {param_layout.dotted(path)}", "pass parameters of this model")


def _as_given(path: Path, leaf: Any, target: jax.ShapeDtypeStruct, on: Any) -> Conversion:
    """For a leaf in engine layout."""
    floats = all(jnp.issubdtype(each.dtype, jnp.floating) for each in (leaf, target))
    if leaf.shape != target.shape or (leaf.dtype != target.dtype and not floats):
        found, wanted = f"{leaf.dtype}{list(leaf.shape)}", f"{target.dtype}{list(target.shape)}"
        problem = f"{param_layout.dotted(path)} is {found}, expected {wanted}"
        raise JaxserveError(problem, "pass parameters of this model, in the layout of its mesh")
    return _conversion(path, target, [TensorPart(path, leaf.shape, (), leaf.shape, leaf.shape)], (leaf,), on)


def _conversion(
    path: Path, target: jax.ShapeDtypeStruct, parts: Iterable[TensorPart], pieces: tuple[Any, ...], on: Any
) -> Conversion:
    nameless = _nameless(parts)
    if pieces[0].dtype == target.dtype and _is_whole(nameless, target.shape):
        return Conversion(path, target, pieces)
    places = tuple(_place(piece, target, on) for piece in pieces)
    shapes = [
        jax.ShapeDtypeStruct(piece.shape, piece.dtype, sharding=place)
        for piece, place in zip(pieces, places, strict=True)
    ]
    return Conversion(path, target, pieces, _joining(nameless, tuple(shapes), target, on), places)


def _nameless(parts: Iterable[TensorPart]) -> Parts:
    """The parts without their paths, by which they are the same in all layers."""
    return tuple(replace(part, path=()) for part in parts)


def _is_whole(parts: Parts, shape: tuple[int, ...]) -> bool:
    """Whether an engine tensor of this shape is a public one."""
    [part, *others] = parts
    return not others and part.columns is None and part.shape == part.view == part.source == shape


def _place(piece: Any, target: jax.ShapeDtypeStruct, on: Any) -> Any:
    """Where a program takes this piece: where it is, if that is on the engine's mesh or device."""
    if on is None:
        return target.sharding
    known = getattr(piece, "sharding", None)
    return known if isinstance(known, NamedSharding) and known.mesh == on else NamedSharding(on, P())


def _of_memory(error: Exception) -> bool:
    return "RESOURCE_EXHAUSTED" in str(error)


def _put(array: Any, where: Any) -> jax.Array:
    return array if getattr(array, "sharding", None) == where else jax.device_put(array, where)


# --- programs -------------------------------------------------------------------------------------------------------

KEPT = 256  # a model has about ten shapes of tensors, and as many again for each dtype and mesh


@lru_cache(KEPT)
def _joining(parts: Parts, shapes: tuple[jax.ShapeDtypeStruct, ...], target: jax.ShapeDtypeStruct, on: Any) -> Any:
    """The program that joins public tensors of these shapes."""

    def join(*pieces: jax.Array) -> jax.Array:
        return param_layout.join(parts, pieces, target)

    return _compiled(join, shapes, on, target.sharding)


@lru_cache(KEPT)
def _splitting(parts: Parts, shape: jax.ShapeDtypeStruct, on: Any) -> Any:
    """The program that computes the public tensors of an engine tensor of this shape; none is that tensor itself."""

    def split(array: jax.Array) -> list[jax.Array]:
        return [jnp.copy(value) for value in param_layout.split(parts, array)]

    return _compiled(split, (shape,), on, NamedSharding(on, P()) if on is not None else None)


def _compiled(function: Any, shapes: tuple[jax.ShapeDtypeStruct, ...], on: Any, out: Any) -> Any:
    if on is not None:
        function = cast(Any, jax.sharding.auto_axes)(function, out_sharding=out.spec)
    with jax.set_mesh(on):
        return jax.jit(function).lower(*shapes).compile()
