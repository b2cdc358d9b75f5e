# SPDX-License-Identifier: Apache-2.0
"""Runs a plain model one layer at a time, in float32, with the layer's weights in hand.

    LayerWeights    a layer's tensors under their names, and its public weights as views of them
    Layers          what enters the first layer, a layer's output and what its weights are multiplied by, perplexity

Only one layer's weights are in memory, besides embeddings and head.
"""

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from convert.files.reader import Array, Reader
from convert.quantize import observed
from convert.quantize.checkpoint import PlainModel
from convert.quantize.observed import Notes
from jaxserve.models import decoder, param_layout
from jaxserve.models.attention import Dense
from jaxserve.models.decoder import Body, Head, Params
from jaxserve.models.mesh_fit import Fit
from jaxserve.models.param_layout import Path
from jaxserve.models.rope import Angles, angles
from jaxserve.models.spec import ModelSpec
from jaxserve.models.weight import component_at, public_paths
from jaxserve.quant.scheme import Quantized

_TOGETHER = 1 << 12  # tokens that are computed at a time
_FLOAT32 = np.dtype(np.float32)


class LayerWeights:
    def __init__(self, model: PlainModel, reader: Reader, number: int) -> None:
        self.layer, self.number, self._plan = model.plan.spec.layers[number], number, model.plan
        names = {info: name for name, info in model.tensors.items()}
        self.names: dict[Path, list[str]] = {
            path: [names[piece.info] for piece in pieces]
            for path, pieces in model.plan.pieces.items()
            if path[:2] == ("layers", number)
        }
        every = dict.fromkeys(name for each in self.names.values() for name in each)
        self.arrays: dict[str, Array] = {name: model.read(reader, name, _FLOAT32) for name in every}

    def path(self, *rest: str) -> Path:
        return ("layers", self.number, *rest)

    def views(self, path: Path) -> list[Array]:
        """The parts of a public weight; what is written to them is written to the layer's tensors."""
        pieces = zip(self._plan.pieces[path], self.names[path], strict=True)
        found = [(piece.view, self.arrays[name]) for piece, name in pieces]
        return [array if view is None else view(array, self.layer) for view, array in found]

    def public(self, path: Path, shape: tuple[int, ...]) -> Array:
        return np.concatenate([view.reshape(-1) for view in self.views(path)]).reshape(shape)


class Layers:
    def __init__(self, model: PlainModel, reader: Reader, length: int) -> None:
        self.spec = replace(model.plan.spec, dtype="float32", quantized=())
        self._model, self._reader, self._length = model, reader, length
        self._rest: dict[Path, Array] = {}

    # --- weights -------------------------------------------------------------------------------------------------

    def _one(self, number: int) -> ModelSpec:
        """A model of this layer alone, with observed weights."""
        alone = replace(self.spec, layers=(self.spec.layers[number],))
        entries = {
            public: observed.scheme(observed.name_of(path))
            for path in _matrices(alone)
            for public in public_paths(path)
        }
        quantized = tuple(Quantized(path=param_layout.dotted(path), scheme=each) for path, each in entries.items())
        return replace(alone, quantized=quantized)

    def params(self, weights: LayerWeights) -> Params:
        """A layer's weights as the decoder has them."""
        spec, tree = self._one(weights.number), dict[str, Any]()
        for path, leaf in param_layout.leaves(param_layout.abstract_params(spec)):
            if path[0] == "layers":
                parts = param_layout.parts_of(path, leaf.shape, spec)
                values = [weights.public(_plain(part.path, spec, weights.number), part.shape) for part in parts]
                param_layout.put(tree, path[2:], param_layout.join(parts, values, leaf))
        return tree

    def inputs_of(self, weights: LayerWeights) -> dict[str, tuple[str, int | None]]:
        """For each tensor that holds a matrix: the name of its input's statistics, and of which expert."""
        spec = replace(self.spec, layers=(weights.layer,))
        found: dict[str, tuple[str, int | None]] = {}
        for path in _matrices(spec):
            for public in public_paths(path):
                experts = "experts" in public
                for i, name in enumerate(weights.names[weights.path(*map(str, public[2:]))]):
                    found[name] = observed.name_of(path), i if experts else None
        return found

    def _global(self, part: type[Body | Head], spec: ModelSpec) -> Params:
        """The parameters of a part of the decoder besides those of layers."""
        tree: Params = {}
        names, plan = decoder.names(part, spec), self._model.plan.in_dtype("float32")
        for path, leaf in param_layout.leaves(param_layout.abstract_params(spec)):
            if path[0] in names and path[0] != "layers":
                if path not in self._rest:
                    host = np.zeros(leaf.shape, leaf.dtype)
                    self._reader.fill(plan.copies(path, host, leaf.shape))
                    self._rest[path] = host
                param_layout.put(tree, path, jnp.asarray(self._rest[path]))
        return tree

    # --- computing -----------------------------------------------------------------------------------------------

    def enter(self, tokens: Array, weights: LayerWeights) -> Array:
        """What enters the first layer, whose weights these are: [count, length, hidden]."""
        spec = self._one(0)
        params = self._global(Body, spec) | {"layers": {0: self.params(weights)}}
        found = [np.asarray(_enter(spec, params, jnp.asarray(each))) for each in self._batches(tokens)]
        return np.concatenate(found)

    def run(self, number: int, params: Params, x: Array) -> Array:
        """A layer's output."""
        return np.concatenate([np.asarray(self._run(number, params, each)[0]) for each in self._batches(x)])

    def observe(self, number: int, params: Params, x: Array) -> Notes:
        """Statistics of what each matrix of a layer is multiplied by."""
        total: Notes | None = None
        for each in self._batches(x):
            notes = self._run(number, params, each, note=True)[1]
            total = notes if total is None else jax.tree.map(jnp.add, total, notes)
        assert total is not None
        return total

    def _run(self, number: int, params: Params, x: Array, *, note: bool = False) -> tuple[jax.Array, Notes]:
        kind = decoder.kinds(self._one(number))[0]
        positions = jnp.broadcast_to(jnp.arange(self._length, dtype=jnp.int32), x.shape[:2])
        rope = self.spec.layers[number].attention.rope
        lengths = jnp.full_like(positions, self._length)
        turn = None if rope is None else angles(rope, positions, lengths if rope.needs_length else None)
        return _run(kind, params, jnp.asarray(x), turn, note=note)

    def perplexity(self, x: Array, tokens: Array) -> float:
        """Of the tokens after the first of each sequence, by the last layer's output."""
        params, losses = self._global(Head, self.spec), list[float]()
        for states, ids in zip(self._batches(x, 8), self._batches(tokens, 8), strict=True):
            losses.append(float(_loss(self.spec, params, jnp.asarray(states), jnp.asarray(ids))))
        return math.exp(sum(losses) / tokens[:, 1:].size)

    def _batches(self, array: Array, parts: int = 1) -> Iterator[Array]:
        """A few sequences at a time."""
        count = max(1, _TOGETHER // parts // self._length)
        for at in range(0, len(array), count):
            yield array[at : at + count]


def _matrices(spec: ModelSpec) -> list[Path]:
    """The engine's weights in layers that activations are multiplied by as matrices."""
    found = param_layout.leaves(decoder.declare(spec, Fit()))
    return [
        path
        for path, variable in found
        if path[0] == "layers" and "ins" in variable.get_metadata() and path[-1] == "kernel"
    ]


def _plain(path: Path, spec: ModelSpec, number: int) -> Path:
    """The public path of the plain weight, in the whole model."""
    whole = path if component_at(spec, path) is None else path[:-1]
    return ("layers", number, *whole[2:])


@partial(jax.jit, static_argnums=0)
def _enter(spec: ModelSpec, params: Params, tokens: jax.Array) -> jax.Array:
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    return decoder.bind(Body, spec, params).enter(tokens, positions, positions)[0]


@partial(jax.jit, static_argnums=0, static_argnames="note")
def _run(kind: Any, params: Params, x: jax.Array, turn: Angles | None, *, note: bool) -> tuple[jax.Array, Notes]:
    notes: Notes = {}
    if not note:
        return nnx.merge(kind, params)(x, turn, Dense(), None)[0], notes
    with observed.noting(notes):
        return nnx.merge(kind, params)(x, turn, Dense(), None)[0], notes


@partial(jax.jit, static_argnums=0)
def _loss(spec: ModelSpec, params: Params, x: jax.Array, tokens: jax.Array) -> jax.Array:
    logprobs = jax.nn.log_softmax(decoder.logits(spec, params, x)[:, :-1])
    return -jnp.sum(jnp.take_along_axis(logprobs, tokens[:, 1:, None], axis=-1))
