# SPDX-License-Identifier: Apache-2.0
"""Weights that note what they are multiplied by: a kind of weight, so that the decoder need not know of it.

While a block is traced within `noting`, every observed weight adds statistics of its inputs under the name of its one
component. A stack of experts has them for each.
"""

from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jaxserve.models.param_layout import Path
from jaxserve.quant.scheme import Component, Scheme
from jaxserve.quant.tensor import QuantTensor, register

type Notes = dict[str, dict[str, jax.Array]]

_NOTES: ContextVar[Notes | None] = ContextVar("notes", default=None)


def name_of(path: Path) -> str:
    """The name for the engine's weight at a path in a layer."""
    return "_".join(map(str, path[2:]))


def scheme(name: str) -> Scheme:
    return Scheme(kind="observed", components=(Component(name=name, dtype="float32"),))


@contextmanager
def noting(notes: Notes) -> Generator[None]:
    before = _NOTES.set(notes)
    try:
        yield
    finally:
        _NOTES.reset(before)


@register("observed")
@dataclass(frozen=True)
class Observed(QuantTensor):
    def dense(self, dtype: jnp.dtype) -> jax.Array:
        return self.rows_first(self._name).astype(dtype)

    @property
    def _name(self) -> str:
        return self.scheme.components[0].name

    def matmul(self, x: jax.Array, dtype: jnp.dtype) -> jax.Array:
        if (notes := _NOTES.get()) is not None:
            notes[self._name] = _statistics(x, jnp.ones(len(x), jnp.float32))
        return super().matmul(x, dtype)

    def grouped_matmul(self, x: jax.Array, offsets: jax.Array) -> jax.Array:
        if (notes := _NOTES.get()) is not None:
            place = jnp.arange(len(x))

            def of_expert(bounds: tuple[jax.Array, jax.Array]) -> dict[str, jax.Array]:
                first, stop = bounds
                return _statistics(x, ((place >= first) & (place < stop)).astype(jnp.float32))

            notes[self._name] = jax.lax.map(of_expert, (offsets[:-1], offsets[1:]))
        return super().grouped_matmul(x, offsets)


def _statistics(x: jax.Array, mine: jax.Array) -> dict[str, jax.Array]:
    """Of the rows that are `mine`: how many, the sum of magnitudes by column, and the sum of products of columns."""
    wide = x.astype(jnp.float32) * mine[:, None]
    gram = jnp.matmul(wide.T, wide, precision=jax.lax.Precision.HIGHEST)
    return {"count": jnp.sum(mine), "size": jnp.sum(jnp.abs(wide), axis=0), "gram": gram}
