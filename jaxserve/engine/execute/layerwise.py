# SPDX-License-Identifier: Apache-2.0
"""A step's first program in pieces, which run one after another.

Equal layers share a piece, so that a model of 30 layers compiles about as fast as one layer, and what is loaded from
disk is as small. In exchange the host starts each layer separately. An engine that starts with few programs uses it on
a CPU until the whole program has been compiled. On a GPU the whole program comes first, since the engine must know how
much memory it takes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax

from jaxserve.engine.execute import model_programs
from jaxserve.engine.execute.model_programs import Begun, Cache, StepSpec
from jaxserve.engine.execute.programs import Program
from jaxserve.engine.execute.weights import shapes_of
from jaxserve.models import decoder
from jaxserve.models.cache_groups import STATE
from jaxserve.models.decoder import Params
from jaxserve.models.spec import ModelSpec

WORTH = 3  # layers that share a piece, on average, for pieces to compile faster than the whole


def worth_it(spec: ModelSpec) -> bool:
    return len(spec.layers) >= WORTH * len(set(decoder.kinds(spec)))


@dataclass(frozen=True)
class Uses:
    """What a layer gets."""

    layer: int
    cache: int  # index
    group: int
    turn: int | None  # index
    stateful: bool

    def of(self, body: Params, cache: Cache, begun: Begun) -> tuple[Any, ...]:
        """Its arguments: parameters, cache, hidden states and the rest."""
        turn = None if self.turn is None else begun.turns[self.turn]
        rows = begun.rows if self.stateful else None
        return body["layers"][self.layer], cache[self.cache], begun.x, turn, begun.paged[self.group], rows


class Layerwise:
    """Called like the executable of `model`, once `executables` are set to those of `programs`."""

    def __init__(self, step: StepSpec, given: Sequence[Any], sharding: Any) -> None:
        """`given`: the shapes of body, cache, tables, last and vector."""
        body, cache, *rest = given
        begun: Begun = jax.eval_shape(partial(model_programs.begin, step), body, *rest)
        begun = jax.tree.map(lambda leaf: leaf.update(sharding=sharding), begun)
        self.executables: Sequence[Any] = ()
        self._uses = [_uses(step, place) for place in range(len(step.spec.layers))]
        kinds = decoder.kinds(step.spec)
        layers: dict[Any, Program] = {}
        for kind, uses in zip(kinds, self._uses, strict=True):
            if kind not in layers:
                layers[kind] = Program(model_programs.layer, (kind,), shapes_of(uses.of(body, cache, begun)))
        self._pieces = [2 + list(layers).index(kind) for kind in kinds]
        self.programs = [
            Program(model_programs.begin, (step,), shapes_of((body, *rest))),
            Program(model_programs.finish, (), (begun.x, begun.sampled)),
            *layers.values(),
        ]

    def __call__(
        self, body: Params, cache: Cache, tables: jax.Array, last: jax.Array, vector: jax.Array
    ) -> tuple[jax.Array, jax.Array, Cache, jax.Array]:
        begin, finish, *_ = self.executables
        begun: Begun = begin(body, tables, last, vector)
        cache = list(cache)
        for uses, piece in zip(self._uses, self._pieces, strict=True):
            begun.x, cache[uses.cache] = self.executables[piece](*uses.of(body, cache, begun))
        return finish(begun.x, begun.sampled), begun.entries, cache, begun.tables


def _uses(step: StepSpec, layer: int) -> Uses:
    group, at = step.groups.at[layer]
    rope = step.spec.layers[layer].attention.rope
    turn = None if rope is None else decoder.ropes(step.spec).index(rope)
    return Uses(layer, at, max(group, 0), turn, stateful=group == STATE)
