# SPDX-License-Identifier: Apache-2.0
"""The public and the engine layout of a model's parameters, and the exact conversion between them.

public   one entry per matrix of the architecture: q, k, v; gate, up; heads counted one by one; the true vocabulary
engine   what the decoder runs: q, k, v fused by KV head, gate and up fused; KV heads repeated, vocabulary and
         MLP columns padded with zeros if the mesh or the hardware requires it (mesh_fit.py)

Conversion only moves values, and is differentiable. Loading uses the same description of an engine tensor's parts
(`parts_of`) to write pieces directly into place.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from jaxserve.errors import JaxserveError
from jaxserve.models.decoder import Params, check_engine, declare
from jaxserve.models.mesh_fit import Fit, fit
from jaxserve.models.spec import Attention, Mlp, ModelSpec, Moe
from jaxserve.parallel import mesh

Path = tuple[str | int, ...]


def abstract_params(spec: ModelSpec, dtype: Any) -> Params:
    """The engine layout as ShapeDtypeStructs, sharded if a mesh is in context."""

    def leaf(value: Any, axes: mesh.Axes) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=mesh.here(axes))

    return _declared(spec, fit(spec, *mesh.shards()), dtype, leaf)


def _declared(spec: ModelSpec, fitted: Fit, dtype: Any, leaf: Callable[[Any, mesh.Axes], Any]) -> Params:
    """The engine layout's tree, with `leaf(shape and dtype, axis names)` for each parameter."""
    _, state = declare(spec, fitted, str(jnp.dtype(dtype)))

    def of(variable: Any) -> Any:
        return leaf(variable.get_value(), variable.get_metadata()["axes"])

    return nnx.to_pure_dict(jax.tree.map(of, state, is_leaf=lambda node: isinstance(node, nnx.Variable)))


def abstract_public(spec: ModelSpec, dtype: Any) -> Params:
    """The public layout as ShapeDtypeStructs."""
    engine = _declared(spec, Fit(), dtype, lambda value, axes: value)
    return jax.eval_shape(lambda params: to_public_layout(spec, params), engine)


def to_engine_layout(spec: ModelSpec, public: Params) -> Params:
    """Convert to the engine layout, sharded over the mesh in context as `abstract_params` describes."""
    pieces = dict(leaves(public))
    dtype = getattr(pieces.get(("embed", "weight")), "dtype", jnp.float32)
    target = _declared(spec, fit(spec, *mesh.shards()), dtype, lambda value, axes: (value, mesh.partition(axes)))

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


def parts_of(path: Path, shape: tuple[int, ...], spec: ModelSpec) -> list[TensorPart]:
    """The public tensors that make up the engine tensor at `path`."""
    if path[0] in ("embed", "head", "head_bias"):
        shape = (spec.vocab_size, *shape[1:])
        return [TensorPart(path, shape, (slice(spec.vocab_size),), shape, shape)]
    if path[0] != "layers":
        return [TensorPart(path, shape, (), shape, shape)]
    layer = spec.layers[cast(int, path[1])]
    if path[2] == "mlp":
        return _mlp_parts(path, shape, layer.mlp)
    if path[2] == "attention" and isinstance(layer.attention, Attention):
        return _attention_parts(path, shape, layer.attention)
    return [TensorPart(path, shape, (), shape, shape)]


def _mlp_parts(path: Path, shape: tuple[int, ...], mlp: Mlp | Moe) -> list[TensorPart]:
    """Two parts for gate_up [(experts,) 2, columns(, hidden)]; one for up [columns, hidden] and down [.., columns]."""
    routed = isinstance(mlp, Moe)
    width = mlp.shared.width if routed and mlp.shared and "shared" in path else mlp.width
    lead, real = (slice(None),) * ("experts" in path), slice(width)
    name, kind = str(path[-2]), path[-1]
    if name == "gate_up":
        piece = (*shape[: len(lead)], width, *shape[len(lead) + 2 :])
        names = ((*path[:-2], part, kind) for part in ("gate", "up"))
        return [TensorPart(part, piece, (*lead, i, real), piece, piece) for i, part in enumerate(names)]
    index: tuple[Any, ...] = ()
    if name == "up":
        shape, index = (width, *shape[1:]), (real,)
    elif name == "down" and kind == "kernel":
        shape, index = (*shape[:-1], width), (*lead, slice(None), real)
    return [TensorPart(path, shape, index, shape, shape)]


def _attention_parts(path: Path, shape: tuple[int, ...], attention: Attention) -> list[TensorPart]:
    heads, kv_heads = attention.heads, attention.kv_heads
    name, kind = path[3], path[-1]
    if name == "qkv":
        stored, group, rest = shape[0], shape[1] - 2, shape[2:]
        queries = (stored, group, *rest)
        parts = [TensorPart((*path[:3], "q", kind), (heads, *rest), (slice(None), slice(group)), queries, queries)]
        for i, key in enumerate(("k", "v")):
            view, source = (kv_heads, stored // kv_heads, *rest), (kv_heads, 1, *rest)
            parts.append(TensorPart((*path[:3], key, kind), (kv_heads, *rest), (slice(None), group + i), view, source))
        return parts
    if name == "k_norm" and len(shape) == 2:
        view, source = (kv_heads, shape[0] // kv_heads, *shape[1:]), (kv_heads, 1, *shape[1:])
        return [TensorPart(path, (kv_heads, *shape[1:]), (), view, source)]
    public = shape
    if path[3:] == ("out", "kernel"):
        public = (shape[0], heads, shape[3])
    elif name == "sinks" or (name == "q_norm" and len(shape) == 3):
        public = (heads, *shape[2:])
    return [TensorPart(path, public, (), public, public)]


def split(parts: Sequence[TensorPart], array: jax.Array) -> list[jax.Array]:
    """The public tensors that an engine tensor is made of."""
    found: list[jax.Array] = []
    for part in parts:
        value = array[part.index].reshape(part.view)
        if part.view != part.source:  # repeated along axis 1
            value = value[:, :1]
        found.append(value.reshape(part.shape))
    return found


def join(parts: Sequence[TensorPart], pieces: Sequence[Any], like: Any) -> jax.Array:
    """The engine tensor made of these public tensors, with the shape and dtype of `like`."""
    values = [
        jnp.broadcast_to(piece.reshape(part.source), part.view) for part, piece in zip(parts, pieces, strict=True)
    ]
    if len(values) == 3:
        q, k, v = values
        value = jnp.concatenate((q, *(x.reshape(q.shape[0], 1, *q.shape[2:]) for x in (k, v))), axis=1)
    elif len(values) == 2:
        value = jnp.stack(values, axis=next(i for i, at in enumerate(parts[0].index) if isinstance(at, int)))
    else:
        [value] = values
    if value.size == like.size:
        value = value.reshape(like.shape)
    else:
        value = jnp.pad(value, [(0, size - had) for size, had in zip(like.shape, value.shape, strict=True)])
    return value.astype(like.dtype)


def check_public(spec: ModelSpec, pieces: Mapping[Path, Any], target: Mapping[Path, Any]) -> None:
    """Raises an error that names the tensor if `pieces` are not those of `target`, the engine layout in their dtype."""
    wanted = {
        part.path: (part.shape, value.dtype)
        for path, value in target.items()
        for part in parts_of(path, value.shape, spec)
    }
    for path, (shape, dtype) in wanted.items():
        if path not in pieces:
            raise JaxserveError(f"the parameters have no {dotted(path)}", "pass the complete public tree")
        found = pieces[path]
        if getattr(found, "shape", None) != shape:
            problem = f"{dotted(path)} has shape {getattr(found, 'shape', None)}, expected {shape}"
            raise JaxserveError(problem, "pass parameters of this model")
        if found.dtype != dtype and not (dtype == jnp.float32 and found.dtype in (jnp.bfloat16, jnp.float16)):
            problem = f"{dotted(path)} is {found.dtype}, but the tree is {dtype}: mixed dtypes are not supported"
            raise JaxserveError(problem, "cast the whole tree to one dtype")
    for path in pieces.keys() - wanted.keys():
        raise JaxserveError(f"the model has no parameter {dotted(path)}", "pass parameters of this model")


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
