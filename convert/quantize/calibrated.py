# SPDX-License-Identifier: Apache-2.0
"""AWQ and GPTQ: rounds a model's layers one after another, by what a text makes them multiply.

Each layer is calibrated on the states that the rounded layers before it put out. A part of the text is held out; its
perplexity is measured with the plain and with the rounded weights, as the layers are computed.
"""

from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from convert.files.reader import Array, Reader
from convert.quantize import awq, gptq
from convert.quantize.checkpoint import PlainModel
from convert.quantize.layers import Layers, LayerWeights
from jaxserve.quant import rounding
from jaxserve.quant.kinds import KINDS

type Calibrated = Literal["awq", "gptq"]


class ByText:
    """A checkpoint.Rounder. Tensors must be asked for in the order of their layers."""

    def __init__(self, model: PlainModel, reader: Reader, method: Calibrated, texts: tuple[Array, Array]) -> None:
        self._model, self._reader, self._method = model, reader, method
        self._tokens, self._held = texts
        self._layers = Layers(model, reader, self._tokens.shape[1])
        self._at = -1  # the layer whose tensors are at hand
        self._components: dict[str, Mapping[str, Array]] = {}
        self._plain: Mapping[str, Array] = {}
        self._states: tuple[Array, Array, Array] | None = None  # calibration, held out, held out of the plain model

    def components(self, name: str) -> Mapping[str, Array]:
        self._reach(name)
        return self._components.pop(name)

    def plain(self, name: str) -> Array | None:
        self._reach(name)
        return self._plain.get(name)

    def report(self) -> str:
        """The perplexity of the text that was held out, with plain and with rounded weights; after all layers."""
        assert self._states is not None and self._at == len(self._layers.spec.layers) - 1
        _, rounded, plain = self._states
        before, after = (self._layers.perplexity(states, self._held) for states in (plain, rounded))
        return f"perplexity of {self._held.size:,} tokens held out: {before:.3f} before, {after:.3f} after"

    def _reach(self, name: str) -> None:
        number = self._model.layer_of(name)
        while number is not None and self._at < number:
            self._advance(self._at + 1)

    def _advance(self, number: int) -> None:
        weights = LayerWeights(self._model, self._reader, number)
        layers = self._layers
        if self._states is None:
            held = layers.enter(self._held, weights)
            self._states = layers.enter(self._tokens, weights), held, held
        states, held, plain_held = self._states
        params = layers.params(weights)
        notes: dict[str, dict[str, Any]] = jax.tree.map(np.asarray, layers.observe(number, params, states))
        plain_held = layers.run(number, params, plain_held)
        inputs: awq.Inputs = {name: statistics(notes, *where) for name, where in layers.inputs_of(weights).items()}
        self._round(weights, inputs)
        params = layers.params(weights)
        self._states = layers.run(number, params, states), layers.run(number, params, held), plain_held
        self._at = number

    def _round(self, weights: LayerWeights, inputs: awq.Inputs) -> None:
        """Make a layer's components, and put their values in the place of its weights."""
        chosen = {name: self._model.chosen[name] for name in weights.arrays if name in self._model.chosen}
        if self._method == "awq":
            awq.scale(weights, inputs, chosen, self._model.stored)
        method = {"awq": awq.components, "gptq": gptq.components}[self._method]
        self._components = {}
        for name, how in chosen.items():
            matrix, scheme = weights.arrays[name], how.scheme
            if how.rounding == "groups":
                parts = method(matrix, inputs[name]["gram"], scheme)
            else:
                names = (each.name for each in scheme.components)
                parts = {part: rounding.encode_on_host(how.rounding, scheme, part, matrix) for part in names}
            self._components[name] = parts
            tensor = KINDS[scheme.kind]({part: jnp.asarray(array) for part, array in parts.items()}, scheme)
            weights.arrays[name] = np.array(tensor.dense(jnp.dtype(jnp.float32)))
        self._plain = {name: array for name, array in weights.arrays.items() if name not in chosen}


def statistics(notes: Mapping[str, Mapping[str, Array]], name: str, expert: int | None) -> dict[str, Array]:
    """Those of one matrix."""
    return {key: value if expert is None else value[expert] for key, value in notes[name].items()}
