# SPDX-License-Identifier: Apache-2.0
"""Computes with weights that are stored as several arrays; see scheme.py for the terms.

A kind of weight is a subclass of QuantTensor, registered under the name that schemes refer to. It must define `dense`,
and may compute products more efficiently. It sees the arrays of one device: models/linear.py shards and sums.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp

from jaxserve.quant.scheme import Scheme
from pallas_kernels.grouped_matmul import grouped_matmul


@dataclass(frozen=True)
class QuantTensor:
    arrays: dict[str, jax.Array]  # by component
    scheme: Scheme
    experts: bool = False  # a stack of weights: all arrays have a leading axis for them

    @property
    def shape(self) -> tuple[int, ...]:
        """(*experts, *rows, columns) of the weight that these arrays describe."""
        codes = self.scheme.components[0]
        *rows, columns = self.rows_first(codes.name).shape
        return (*rows, columns * (codes.columns or 1))

    def rows_first(self, name: str) -> jax.Array:
        """A component with its columns on the last axis."""
        [component] = (each for each in self.scheme.components if each.name == name)
        array = self.arrays[name]
        return jnp.moveaxis(array, int(self.experts), -1) if component.columns_first else array

    def spread(self, name: str) -> jax.Array:
        """A component's values, one for each column, to be broadcast over (*experts, *rows, columns)."""
        [component] = (each for each in self.scheme.components if each.name == name)
        array = self.rows_first(name)
        if component.columns is None:
            array = array[..., None]
        elif component.columns > 1:
            array = jnp.repeat(array, component.columns, axis=-1)
        lead = int(self.experts)
        missing = len(self.shape) - array.ndim
        return array if component.rows else jnp.expand_dims(array, tuple(range(lead, lead + missing)))

    def dense(self, dtype: jnp.dtype) -> jax.Array:
        """The weight as one array, [*experts, *rows, columns]."""
        raise NotImplementedError

    def matmul(self, x: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """x [tokens, columns] -> [tokens, rows] of `dtype`, with all rows on one axis."""
        columns = self.shape[-1]
        weight = self.dense(x.dtype).reshape(-1, columns)
        return jax.lax.dot_general(x, weight, (((1,), (1,)), ((), ())), preferred_element_type=dtype)

    def grouped_matmul(self, x: jax.Array, offsets: jax.Array) -> jax.Array:
        """Rows of x, sorted by expert, each times its expert's weight; see pallas_kernels.grouped_matmul."""
        experts, *_, columns = self.shape
        return grouped_matmul(x, self.dense(x.dtype).reshape(experts, -1, columns), offsets)

    def take(self, ids: jax.Array, pick: Callable[[jax.Array, jax.Array], jax.Array]) -> "QuantTensor":
        """The rows with these numbers, which `pick(array, ids)` selects on an array's first axis."""
        arrays = {
            each.name: pick(self.rows_first(each.name), ids) if each.rows else self.arrays[each.name]
            for each in self.scheme.components
        }
        components = tuple(replace(each, columns_first=False) for each in self.scheme.components)
        return replace(self, arrays=arrays, scheme=replace(self.scheme, components=components))


KINDS: dict[str, type[QuantTensor]] = {}


def register[Kind: QuantTensor](*names: str) -> Callable[[type[Kind]], type[Kind]]:
    """A decorator that registers a subclass of QuantTensor as the arithmetic of schemes of these kinds."""

    def decorate(kind: type[Kind]) -> type[Kind]:
        KINDS.update(dict.fromkeys(names, kind))
        return jax.tree_util.register_dataclass(kind, data_fields=["arrays"], meta_fields=["scheme", "experts"])

    return decorate
