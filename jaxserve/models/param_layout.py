# SPDX-License-Identifier: Apache-2.0
"""The public and the engine layout of a model's parameters, and the exact conversion between them.

public   one entry per matrix of the architecture: q, k, v; gate, up; heads counted one by one; the true vocabulary
engine   what the decoder runs: q, k, v fused by KV head, gate and up fused; KV heads repeated, vocabulary and
         MLP columns padded with zeros if the mesh or the hardware requires it (mesh_fit.py)

A weight that is stored in several arrays has a dict of them in both, which are fused, repeated and padded as it is.

Conversion only moves values, and is differentiable. Loading uses the same description of an engine tensor's parts
(`parts_of`) to write pieces directly into place.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.dtypes import canonicalize_dtype
from jax.sharding import PartitionSpec as P

from jaxserve.errors import JaxserveError
from jaxserve.models.decoder import Params, check_engine, declare
from jaxserve.models.mesh_fit import Fit, fit
from jaxserve.models.spec import DTYPES, Attention, Mlp, ModelSpec, Moe
from jaxserve.models.weight import Path, component_at, public_paths, scheme_at
from jaxserve.parallel import mesh
from jaxserve.quant.scheme import Component
from pallas_kernels.checks import is_concrete


def abstract_params(spec: ModelSpec, dtype: Any = None) -> Params:
    """The engine layout as ShapeDtypeStructs, sharded if a mesh is in context. `dtype`: instead of the spec's."""

    def leaf(value: Any, axes: mesh.Axes) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=mesh.here(axes))

    return _declared(_as(spec, dtype), fit(spec, *mesh.shards()), leaf)


def _declared(spec: ModelSpec, fitted: Fit, leaf: Callable[[Any, mesh.Axes], Any]) -> Params:
    """The engine layout's tree, with `leaf(shape and dtype, axis names)` for each parameter."""

    def of(variable: Any) -> Any:
        return leaf(variable.get_value(), variable.get_metadata()["axes"])

    return jax.tree.map(of, declare(spec, fitted), is_leaf=lambda node: isinstance(node, nnx.Variable))


def abstract_public(spec: ModelSpec, dtype: Any = None) -> Params:
    """The public layout as ShapeDtypeStructs. `dtype`: instead of the spec's."""
    engine = _declared(_as(spec, dtype), Fit(), lambda value, axes: value)
    return jax.eval_shape(lambda params: to_public_layout(spec, params), engine)


def count(spec: ModelSpec) -> int:
    """The number of parameters; a quantized weight has as many as it has codes."""
    total = 0
    for path, leaf in leaves(abstract_public(spec)):
        component = component_at(spec, path)
        scheme = None if component is None else scheme_at(spec, path[:-1])
        if scheme is None:
            total += math.prod(leaf.shape)
        elif component == scheme.components[0]:
            total += math.prod(leaf.shape) * (scheme.components[0].columns or 1)
    return total


def _as(spec: ModelSpec, dtype: Any) -> ModelSpec:
    return spec if dtype is None else replace(spec, dtype=jnp.dtype(dtype).name)


def with_dtype_of(spec: ModelSpec, given: Mapping[Path, Any]) -> ModelSpec:
    """The spec with the dtype of these parameters, in either layout; with its own if none of them shows it."""
    # Outside of the layers all leaves have the model's dtype; within, some are float32 in every model.
    for path in sorted(path for path in given if path[0] != "layers"):
        found = getattr(given[path], "dtype", None)
        if (
            found is not None
            and component_at(spec, path) is None
            and (name := jnp.dtype(canonicalize_dtype(found)).name) in DTYPES
        ):
            return replace(spec, dtype=name)
    return spec


def to_engine_layout(spec: ModelSpec, public: Params) -> Params:
    """Convert to the engine layout in the tree's dtype, sharded over the mesh in context as `abstract_params` says."""
    pieces = dict(leaves(public))
    spec = with_dtype_of(spec, pieces)
    target = _declared(spec, fit(spec, *mesh.shards()), lambda value, axes: (value, mesh.partition(axes)))

    def convert(pieces: dict[Path, Any]) -> Params:
        engine: Params = {}
        for path, (value, _) in leaves(target):
            parts = parts_of(path, value.shape, spec)
            put(engine, path, join(parts, [pieces[part.path] for part in parts], value))
        return engine

    check_public(spec, pieces, {path: value for path, (value, _) in leaves(target)})
    if not mesh.in_mesh():
        return convert(pieces)
    cuts = jax.tree.map(lambda pair: pair[1], target, is_leaf=lambda node: isinstance(node, tuple))
    return cast(Any, jax.sharding.auto_axes(convert, out_sharding=cuts))(pieces)


def to_public_layout(spec: ModelSpec, engine: Params) -> Params:
    check_engine(spec, engine)

    def convert(engine: Params) -> Params:
        public: Params = {}
        for path, array in leaves(engine):
            parts = parts_of(path, array.shape, spec)
            for part, value in zip(parts, split(parts, array), strict=True):
                put(public, part.path, value)
        return public

    if not mesh.in_mesh():
        return convert(engine)
    return cast(Any, jax.sharding.auto_axes(convert, out_sharding=P()))(engine)


# --- an engine tensor and its parts ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class TensorPart:
    """engine[index] viewed as `view` equals the public tensor viewed as `source` and broadcast."""

    path: Path
    shape: tuple[int, ...]  # the public tensor's
    index: tuple[Any, ...]
    view: tuple[int, ...]
    source: tuple[int, ...]
    columns: int | None = None  # the engine's axis of columns, which is the last one in all of the above
    shared: bool = False  # fused tensors must be equal: the engine has one of them

    def rows_first[Tensor: (jax.Array, np.ndarray[Any, Any])](self, engine: Tensor) -> Tensor:
        if self.columns is None:
            return engine
        order = [axis for axis in range(engine.ndim) if axis != self.columns]
        return engine.transpose(*order, self.columns)


def parts_of(path: Path, shape: tuple[int, ...], spec: ModelSpec) -> list[TensorPart]:
    """The public tensors that make up the engine tensor at `path`."""
    component = component_at(spec, path)
    if component is None:
        return _parts(path, shape, spec)
    name, stored = str(path[-1]), path[:-1]
    if not component.rows:
        return _shared_parts(stored, shape, spec, component)
    axis = None
    if component.columns_first and component.columns is not None:
        axis = int("experts" in stored)
        shape = (*shape[:axis], *shape[axis + 1 :], shape[axis])
    parts = _parts(stored, shape, spec, component)
    return [replace(part, path=(*part.path, name), columns=axis) for part in parts]


def _shared_parts(path: Path, shape: tuple[int, ...], spec: ModelSpec, component: Component) -> list[TensorPart]:
    """Of a component that has no values for each row."""
    fused, index = public_paths(path), ()
    if path[0] == "layers" and path[2] == "mlp" and path[-2] == "down" and component.columns is not None:
        groups = _groups(path, _width(path, spec.layers[cast(int, path[1])].mlp), component)
        shape, index = (*shape[:-1], groups), (*(slice(None),) * (len(shape) - 1), slice(groups))
    paths = [(*each, component.name) for each in fused]
    return [TensorPart(each, shape, index, shape, shape, shared=len(fused) > 1) for each in paths]


def _parts(path: Path, shape: tuple[int, ...], spec: ModelSpec, component: Component | None = None) -> list[TensorPart]:
    """Of a plain tensor, or of a component that has values for each row, of the weight at `path`."""
    if path[0] in ("embed", "head", "head_bias"):
        shape = (spec.vocab_size, *shape[1:])
        return [TensorPart(path, shape, (slice(spec.vocab_size),), shape, shape)]
    if path[0] != "layers":
        return [TensorPart(path, shape, (), shape, shape)]
    layer = spec.layers[cast(int, path[1])]
    if path[2] == "mlp":
        return _mlp_parts(path, shape, layer.mlp, component)
    if path[2] == "attention" and isinstance(layer.attention, Attention):
        return _attention_parts(path, shape, layer.attention)
    return [TensorPart(path, shape, (), shape, shape)]


def _mlp_parts(path: Path, shape: tuple[int, ...], mlp: Mlp | Moe, component: Component | None) -> list[TensorPart]:
    """Two parts for gate_up [(experts,) 2, columns(, hidden)]; one for up [columns, hidden] and down [.., columns]."""
    width = _width(path, mlp)
    lead, real = (slice(None),) * ("experts" in path), slice(width)
    name, kind = str(path[-2]), path[-1]
    if name == "gate_up":
        piece = (*shape[: len(lead)], width, *shape[len(lead) + 2 :])
        names = public_paths(path)
        return [TensorPart(part, piece, (*lead, i, real), piece, piece) for i, part in enumerate(names)]
    index: tuple[Any, ...] = ()
    if name == "up":
        shape, index = (width, *shape[1:]), (real,)
    elif name == "down" and kind == "kernel" and (component is None or component.columns is not None):
        groups = width if component is None else _groups(path, width, component)
        shape, index = (*shape[:-1], groups), (*lead, slice(None), slice(groups))
    return [TensorPart(path, shape, index, shape, shape)]


def _width(path: Path, mlp: Mlp | Moe) -> int:
    return mlp.shared.width if isinstance(mlp, Moe) and mlp.shared and "shared" in path else mlp.width


def _groups(path: Path, width: int, component: Component) -> int:
    assert component.columns is not None
    if width % component.columns:
        problem = f"{dotted(path)} has {width} columns, which groups of {component.columns} ({component.name})"
        raise JaxserveError(f"{problem} do not divide", "use another checkpoint")
    return width // component.columns


def _attention_parts(path: Path, shape: tuple[int, ...], attention: Attention) -> list[TensorPart]:
    heads, kv_heads = attention.heads, attention.kv_heads
    name = path[3]
    if name == "qkv":
        stored, group, rest = shape[0], shape[1] - 2, shape[2:]
        q, *keys = public_paths(path)
        queries = (stored, group, *rest)
        parts = [TensorPart(q, (heads, *rest), (slice(None), slice(group)), queries, queries)]
        for i, key in enumerate(keys):
            view, source = (kv_heads, stored // kv_heads, *rest), (kv_heads, 1, *rest)
            parts.append(TensorPart(key, (kv_heads, *rest), (slice(None), group + i), view, source))
        return parts
    if name == "k_norm" and len(shape) == 2:
        view, source = (kv_heads, shape[0] // kv_heads, *shape[1:]), (kv_heads, 1, *shape[1:])
        return [TensorPart(path, (kv_heads, *shape[1:]), (), view, source)]
    public = shape
    if path[3:] == ("out", "kernel") and len(shape) == 4:  # a component has one axis for all columns, or none
        public = (shape[0], heads, shape[3])
    elif name == "sinks" or (name == "q_norm" and len(shape) == 3):
        public = (heads, *shape[2:])
    return [TensorPart(path, public, (), public, public)]


def split(parts: Sequence[TensorPart], array: jax.Array) -> list[jax.Array]:
    """The public tensors that an engine tensor is made of."""
    found: list[jax.Array] = []
    for part in parts:
        value = part.rows_first(array)[part.index].reshape(part.view)
        if part.view != part.source:  # repeated along axis 1
            value = value[:, :1]
        found.append(value.reshape(part.shape))
    return found


def join(parts: Sequence[TensorPart], pieces: Sequence[Any], like: Any) -> jax.Array:
    """The engine tensor made of these public tensors, with the shape and dtype of `like`."""
    values = [
        jnp.broadcast_to(piece.reshape(part.source), part.view) for part, piece in zip(parts, pieces, strict=True)
    ]
    columns = parts[0].columns
    shape = tuple(size for axis, size in enumerate(like.shape) if axis != columns)
    shape = shape if columns is None else (*shape, like.shape[columns])
    if len(values) == 1 or parts[0].shared:
        value = values[0]
    elif len(values) == 3:
        q, k, v = values
        value = jnp.concatenate((q, *(x.reshape(q.shape[0], 1, *q.shape[2:]) for x in (k, v))), axis=1)
    else:
        value = jnp.stack(values, axis=next(i for i, at in enumerate(parts[0].index) if isinstance(at, int)))
    if value.size == math.prod(shape):
        value = value.reshape(shape)
    else:
        value = jnp.pad(value, [(0, size - had) for size, had in zip(shape, value.shape, strict=True)])
    value = value if columns is None else jnp.moveaxis(value, -1, columns)
    return value.astype(like.dtype)


def check_public(spec: ModelSpec, pieces: Mapping[Path, Any], target: Mapping[Path, Any]) -> None:
    """Raises an error that names the tensor if `pieces` are not those of `target`, the engine layout in their dtype."""
    wanted = {
        part.path: (part.shape, value.dtype, component_at(spec, path))
        for path, value in target.items()
        for part in parts_of(path, value.shape, spec)
    }
    for path, (shape, dtype, component) in wanted.items():
        if path not in pieces:
            raise JaxserveError(f"the parameters have no {dotted(path)}", "pass the complete public tree")
        found = pieces[path]
        if getattr(found, "shape", None) != shape:
            problem = f"{dotted(path)} has shape {getattr(found, 'shape', None)}, expected {shape}"
            raise JaxserveError(problem, "pass parameters of this model")
        if component is not None and found.dtype != dtype:
            problem = f"{dotted(path)} is {found.dtype}, expected {dtype}"
            raise JaxserveError(problem, "pass parameters of this model")
        if found.dtype != dtype and not (dtype == jnp.float32 and found.dtype in (jnp.bfloat16, jnp.float16)):
            problem = f"{dotted(path)} is {found.dtype}, but the tree is {dtype}: mixed dtypes are not supported"
            raise JaxserveError(problem, "cast the whole tree to one dtype")
    for path in pieces.keys() - wanted.keys():
        raise JaxserveError(f"the model has no parameter {dotted(path)}", "pass parameters of this model")
    for path, value in target.items() if spec.quantized else ():
        first, *others = parts_of(path, value.shape, spec)
        for part in others if first.shared and is_concrete(pieces[first.path]) else ():
            if not np.array_equal(pieces[part.path], pieces[first.path]):
                problem = f"{dotted(part.path)} differs from that of the weights it is fused with"
                raise JaxserveError(problem, "pass parameters that agree")


# --- paths ----------------------------------------------------------------------------------------------------------


def leaves(tree: Any, at: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Every array with its path. Layers may be a list, or a dict with keys such as "0", as Orbax restores them."""
    items = tree.items() if isinstance(tree, Mapping) else enumerate(tree)
    for key, value in cast(Iterable[tuple[Any, Any]], items):
        key = int(key) if isinstance(key, str) and key.isdecimal() else key
        if isinstance(value, Mapping | list):
            yield from leaves(value, (*at, key))
        else:
            yield (*at, key), value


def put(tree: Params, path: Path, value: Any) -> None:
    node: Any = tree
    for key in path[:-1]:
        node = node.setdefault(key, {})
    node[path[-1]] = value


def dotted(path: Path) -> str:
    return ".".join(map(str, path))
