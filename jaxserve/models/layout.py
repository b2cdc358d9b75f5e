# SPDX-License-Identifier: Apache-2.0
"""The two layouts of a model's parameters, and the exact way between them.

public   one entry per matrix of the architecture: q, k, v; gate, up; heads counted one by one; the true vocabulary
engine   what the decoder runs: q, k, v fused by KV head, gate and up fused; KV heads repeated and the vocabulary
         padded with zero rows where a mesh needs it (Fit)

Converting moves values and never computes with them, and can be differentiated. Loading uses the same description of
an engine tensor's parts (`parts_of`) to write pieces straight into it.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from jaxserve.errors import JaxserveError
from jaxserve.models.decoder import Params, declare
from jaxserve.models.spec import Attention, Mlp, ModelSpec
from jaxserve.parallel import mesh

Path = tuple[str | int, ...]


@dataclass(frozen=True)
class Fit:
    """How a model is fitted to a mesh: KV heads stored `kv_repeat` times, `vocab_rows` rows of vocabulary."""

    kv_repeat: int
    vocab_rows: int


def fit(spec: ModelSpec) -> Fit:
    """For the mesh in context. What does not divide is padded (vocabulary), repeated (KV heads), or refused."""
    tensor, experts = mesh.axis_size("heads"), mesh.axis_size("experts")
    repeats = {1}
    for layer in spec.layers:
        attention, mlp = layer.attention, layer.mlp
        _need(attention.heads, tensor, "attention heads")
        if isinstance(attention, Attention):
            if attention.kv_heads % tensor:
                _need(tensor, attention.kv_heads, "tensor shards", "KV heads")
            repeats.add(max(1, tensor // attention.kv_heads))
        if isinstance(mlp, Mlp):
            _need(mlp.width, tensor, "MLP columns")
        else:
            _need(mlp.width, tensor, "MLP columns of an expert")
            _need(mlp.router.experts, experts, "experts", "expert shards")
            if mlp.shared is not None:
                _need(mlp.shared.width, tensor, "MLP columns of the shared expert")
    if len(repeats - {1}) > 1:
        raise JaxserveError(f"layers differ in KV heads: {tensor} tensor shards do not fit", "use fewer shards")
    return Fit(max(repeats), -(-spec.vocab_size // tensor) * tensor)


def _need(count: int, parts: int, what: str, of: str = "tensor shards") -> None:
    if count % parts:
        raise JaxserveError(f"{count} {what} do not divide among {parts} {of}", "choose another number of shards")


def abstract_params(spec: ModelSpec, dtype: Any) -> Params:
    """The engine layout as ShapeDtypeStructs, sharded where a mesh is in context."""

    def leaf(value: Any, axes: mesh.Axes) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=mesh.here(axes))

    return _declared(spec, fit(spec), str(jnp.dtype(dtype)), leaf)


def _declared(spec: ModelSpec, fitted: Fit, dtype: str, leaf: Callable[[Any, mesh.Axes], Any]) -> Params:
    """The engine layout's tree, a value made of each parameter's shape and the names of its axes."""
    _, state = declare(spec, kv_repeat=fitted.kv_repeat, vocab_rows=fitted.vocab_rows, dtype=dtype)

    def of(variable: Any) -> Any:
        return leaf(variable.get_value(), variable.get_metadata()["axes"])

    return nnx.to_pure_dict(jax.tree.map(of, state, is_leaf=lambda node: isinstance(node, nnx.Variable)))


def abstract_public(spec: ModelSpec, dtype: Any) -> Params:
    """The public layout as ShapeDtypeStructs."""
    engine = _declared(spec, Fit(1, spec.vocab_size), str(jnp.dtype(dtype)), lambda value, axes: value)
    return jax.eval_shape(lambda params: to_public_layout(spec, params), engine)


def to_engine_layout(spec: ModelSpec, public: Params) -> Params:
    """Fitted to the mesh in context, where the result then lies as `abstract_params` says."""
    fitted = fit(spec)
    pieces = dict(leaves(public))
    dtype = str(pieces["embed", "weight"].dtype)
    target = _declared(spec, fitted, dtype, lambda value, axes: (value, mesh.partition(axes)))

    def convert(pieces: dict[Path, Any]) -> Params:
        engine: Params = {}
        for path, (value, _) in leaves(target):
            parts = parts_of(path, value.shape, spec, fitted)
            put(engine, path, _join(parts, [pieces[part.path] for part in parts], value))
        return engine

    _check_public(spec, pieces, target, fitted)
    if not mesh.in_mesh():
        return convert(pieces)
    cuts = jax.tree.map(lambda pair: pair[1], target, is_leaf=lambda node: isinstance(node, tuple))
    return cast(Any, jax.sharding.auto_axes(convert, out_sharding=cuts))(pieces)


def to_public_layout(spec: ModelSpec, engine: Params) -> Params:
    fitted = fitted_as(spec, engine)

    def convert(engine: Params) -> Params:
        public: Params = {}
        for path, array in leaves(engine):
            for part in parts_of(path, array.shape, spec, fitted):
                value = array[part.index].reshape(part.view)
                if part.view != part.source:  # repeated along axis 1
                    value = value[:, :1]
                put(public, part.path, value.reshape(part.shape))
        return public

    if not mesh.in_mesh():
        return convert(engine)
    return cast(Any, jax.sharding.auto_axes(convert, out_sharding=P()))(engine)


def fitted_as(spec: ModelSpec, engine: Params) -> Fit:
    """The Fit that these parameters were made with."""
    repeat, attention = 1, spec.layers[0].attention
    if isinstance(attention, Attention):
        repeat = engine["layers"][0]["attention"]["qkv"]["kernel"].shape[0] // attention.kv_heads
    return Fit(repeat, engine["embed"]["weight"].shape[0])


# --- an engine tensor and its parts ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """engine[index], seen with shape `view`, is the public tensor, seen with shape `source` and broadcast."""

    path: Path
    shape: tuple[int, ...]  # the public tensor's
    index: tuple[Any, ...]
    view: tuple[int, ...]
    source: tuple[int, ...]


def parts_of(path: Path, shape: tuple[int, ...], spec: ModelSpec, fitted: Fit) -> list[Part]:
    """The public tensors that the engine tensor at `path` is made of."""
    attention = spec.layers[cast(int, path[1])].attention if path[0] == "layers" else None
    if isinstance(attention, Attention) and path[2] == "attention":
        return _attention_parts(path, shape, attention, fitted.kv_repeat)
    if "gate_up" in path:
        axis = 1 if "experts" in path else 0
        piece = (*shape[:axis], *shape[axis + 1 :])
        names = ((*path[:-2], name, path[-1]) for name in ("gate", "up"))
        return [Part(name, piece, (slice(None),) * axis + (i,), piece, piece) for i, name in enumerate(names)]
    if path[0] in ("embed", "head", "head_bias"):
        shape = (spec.vocab_size, *shape[1:])
        return [Part(path, shape, (slice(spec.vocab_size),), shape, shape)]
    return [Part(path, shape, (), shape, shape)]


def _attention_parts(path: Path, shape: tuple[int, ...], attention: Attention, repeat: int) -> list[Part]:
    heads, kv_heads, group = attention.heads, attention.kv_heads, attention.group // repeat
    name = path[3]
    if name == "qkv":
        base, kind, rest = path[:3], path[-1], shape[2:]
        queries = (shape[0], group, *rest)
        parts = [Part((*base, "q", kind), (heads, *rest), (slice(None), slice(group)), queries, queries)]
        for i, key in enumerate(("k", "v")):
            view, source = (kv_heads, repeat, *rest), (kv_heads, 1, *rest)
            parts.append(Part((*base, key, kind), (kv_heads, *rest), (slice(None), group + i), view, source))
        return parts
    if name == "k_norm" and len(shape) == 2:
        view, source = (kv_heads, repeat, *shape[1:]), (kv_heads, 1, *shape[1:])
        return [Part(path, (kv_heads, *shape[1:]), (), view, source)]
    flat = shape
    if path[3:] == ("out", "kernel"):
        flat = (shape[0], heads, shape[3])
    elif name == "sinks" or (name == "q_norm" and len(shape) == 3):
        flat = (heads, *shape[2:])
    return [Part(path, flat, (), shape, shape)]


def _join(parts: list[Part], pieces: list[Any], like: Any) -> jax.Array:
    values = [
        jnp.broadcast_to(piece.reshape(part.source), part.view) for part, piece in zip(parts, pieces, strict=True)
    ]
    if len(values) == 1:
        [value] = values
        value = value.reshape(like.shape) if value.size == like.size else _padded(value, like)
    elif len(values) == 2:
        value = jnp.stack(values, axis=len(parts[0].index) - 1)
    else:
        q, k, v = values
        value = jnp.concatenate((q, *(x.reshape(q.shape[0], 1, *q.shape[2:]) for x in (k, v))), axis=1)
    return value.astype(like.dtype)


def _padded(value: jax.Array, like: Any) -> jax.Array:
    return jnp.pad(value, [(0, like.shape[0] - value.shape[0])] + [(0, 0)] * (value.ndim - 1))


def _check_public(spec: ModelSpec, pieces: Mapping[Path, Any], target: Params, fitted: Fit) -> None:
    wanted = {
        part.path: part.shape
        for path, (value, _) in leaves(target)
        for part in parts_of(path, value.shape, spec, fitted)
    }
    for path, shape in wanted.items():
        if path not in pieces:
            raise JaxserveError(f"the parameters lack {dotted(path)}", "give the whole public tree")
        if pieces[path].shape != shape:
            problem = f"{dotted(path)} has shape {pieces[path].shape}, expected {shape}"
            raise JaxserveError(problem, "give parameters of this model")
    for path in pieces.keys() - wanted.keys():
        raise JaxserveError(f"the model has no parameter {dotted(path)}", "give parameters of this model")


# --- paths ----------------------------------------------------------------------------------------------------------


def leaves(tree: Mapping[Any, Any], at: Path = ()) -> Iterator[tuple[Path, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from leaves(cast(Mapping[Any, Any], value), (*at, key))
        else:
            yield (*at, key), value


def put(tree: Params, path: Path, value: Any) -> None:
    node: Any = tree
    for key in path[:-1]:
        node = node.setdefault(key, {})
    node[path[-1]] = value


def dotted(path: Path) -> str:
    return ".".join(map(str, path))
