# SPDX-License-Identifier: Apache-2.0
"""Weights whose codes share scales by row or by group of columns: integers, float8, and 4 bits through a table.

schemes.py has the formula and the layout of codes. Values are computed in float32. On CPUs, products with the codes in
each place of their bytes are added up, since to put neighbouring columns side by side again would take longer than
anything else about decoding. GPUs read the codes as they are stored (pallas_kernels/quant_matmul.py): its kernel takes
the layout that loading gives them, so there is no other one to convert to.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.quant.schemes import CODES, MINIMUMS, ORDER, ROW_SCALES, SCALES, ZEROS
from jaxserve.quant.tables import VALUES
from jaxserve.quant.tensor import QuantTensor, register
from pallas_kernels import dispatch
from pallas_kernels.checks import FLOATS
from pallas_kernels.on_cpu.grouped_matmul import grouped_matmul_by
from pallas_kernels.on_cpu.matmul import matmul as matmul_on_cpu
from pallas_kernels.quant_matmul import MOST_ROWS, quant_matmul, takes

_FLOAT32 = jnp.dtype(jnp.float32)
_NUMBERS = ("groups", "float8")  # kinds whose codes are numbers themselves
_DECODED = 1 << 19  # values of a weight that CPUs decode at a time


@register("groups")
@dataclass(frozen=True)
class Grouped(QuantTensor):
    def dense(self, dtype: jnp.dtype) -> jax.Array:
        return jnp.stack(self._planes(), axis=-1).reshape(self.shape).astype(dtype)

    def matmul(self, x: jax.Array, dtype: jnp.dtype) -> jax.Array:
        if dispatch.implementation() != "cpu":
            weight = self._for_kernel(x)
            return super().matmul(x, dtype) if weight is None else quant_matmul(x, *weight, out_dtype=dtype)
        columns = [self._columns(x, place) for place in range(self._per_byte)]

        bits = self._bits()

        def product(first: jax.Array | int, count: int) -> jax.Array:
            part = bits._rows(first, count)
            return _sum(matmul_on_cpu(each, part._matrix(place)) for place, each in enumerate(columns))

        return self._by_rows(len(x), product).astype(dtype)

    def _for_kernel(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array | None] | None:
        """The codes, scales and zero points of a matrix that GPUs multiply by as it is stored; None if they have to
        decode it first: for many rows, and if the kernel has no such codes, factors or groups, such as those of columns
        in any order."""
        if x.shape[0] > MOST_ROWS or self.scheme.kind not in _NUMBERS or not {*self.arrays} <= {CODES, SCALES, ZEROS}:
            return None
        codes, scales = self._with_groups(CODES), self._with_groups(SCALES)
        zeros = self._with_groups(ZEROS) if ZEROS in self.arrays else None
        if self._per_byte > 2 or (codes.dtype == jnp.uint8 and self._per_byte != 2):
            return None
        if zeros is not None and (self._per_byte != 2 or zeros.dtype != jnp.uint8):
            return None
        return (codes, scales, zeros) if scales.dtype in FLOATS and takes(x, codes, scales) else None

    def _with_groups(self, name: str) -> jax.Array:
        """A component as a matrix, with one column if one value is for all columns."""
        array = self.rows_first(name)
        [component] = (each for each in self.scheme.components if each.name == name)
        return array.reshape(-1, 1 if component.columns is None else array.shape[-1])

    def grouped_matmul(self, x: jax.Array, offsets: jax.Array) -> jax.Array:
        if dispatch.implementation() != "cpu":
            return super().grouped_matmul(x, offsets)
        experts = self.shape[0]
        columns = [self._columns(x, place) for place in range(self._per_byte)]

        bits = self._bits()

        def product(first: jax.Array | int, count: int) -> jax.Array:
            def matrix(place: int, expert: jax.Array) -> jax.Array:
                return bits._expert(expert)._rows(first, count)._matrix(place)

            return _sum(
                grouped_matmul_by(partial(matrix, place), each, offsets, shape=(experts, count), out_dtype=_FLOAT32)
                for place, each in enumerate(columns)
            )

        return self._by_rows(len(x), product).astype(x.dtype)

    def _bits(self) -> Self:
        return self

    def _by_rows(self, tokens: int, product: Callable[[Any, int], jax.Array]) -> jax.Array:
        """[tokens, rows], computed by `product(first row, number of rows)`. A few rows at a time: what is decoded stays
        in the processor's cache, and the system need not find memory for it, which took 20 times as long."""
        *rows, columns = self.shape[int(self.experts) :]
        total, count = math.prod(rows), max(1, _DECODED // columns)
        if total <= count:
            return product(0, total)

        def step(i: jax.Array, out: jax.Array) -> jax.Array:
            first = jnp.minimum(i * count, total - count)  # the last rows may be computed twice
            return jax.lax.dynamic_update_slice_in_dim(out, product(first, count), first, axis=1)

        return jax.lax.fori_loop(0, -(-total // count), step, jnp.zeros((tokens, total), _FLOAT32))

    def _expert(self, expert: jax.Array) -> Self:
        pick = partial(jax.lax.dynamic_index_in_dim, index=expert, keepdims=False)
        return type(self)(jax.tree.map(pick, self.arrays), self.scheme)

    def _rows(self, first: jax.Array | int, count: int) -> Self:
        """Some rows, on one axis."""
        arrays = dict(self.arrays)
        for each in self.scheme.components:
            if each.rows:
                array = self.rows_first(each.name)
                array = array.reshape(-1, *(() if each.columns is None else array.shape[-1:]))
                arrays[each.name] = jax.lax.dynamic_slice_in_dim(array, first, count)
        components = tuple(replace(each, columns_first=False) for each in self.scheme.components)
        return type(self)(arrays, replace(self.scheme, components=components))

    def _matrix(self, place: int) -> jax.Array:
        # Without the barrier, XLA decodes the weight inside of the product, once per use of a value.
        return jax.lax.optimization_barrier(self._plane(place))

    @property
    def _per_byte(self) -> int:
        return self.scheme.components[0].columns or 1

    def _columns(self, x: jax.Array, place: int) -> jax.Array:
        """Activations of the columns whose codes are in this place of their bytes."""
        return x[:, place :: self._per_byte].astype(_FLOAT32)

    def _planes(self) -> list[jax.Array]:
        return [self._plane(place) for place in range(self._per_byte)]

    def _plane(self, place: int) -> jax.Array:
        """The weight's columns whose codes are in this place of their bytes: [..., bytes], float32.

        They are computed as [..., groups, bytes of a group], in which CPUs need not find out where each group ends.
        """
        codes = self._codes(place)
        group = self.scheme.components[1].columns
        groups = 1 if group is None or ORDER in self.arrays else codes.shape[-1] * self._per_byte // group
        values = self._decode(codes.reshape(*codes.shape[:-1], groups, -1))
        if ZEROS in self.arrays:
            values = values - self._factor(ZEROS, place)
        values = values * self._factor(SCALES, place)
        if ROW_SCALES in self.arrays:
            values = values * self._factor(ROW_SCALES, place)
        values = values + self._factor(MINIMUMS, place) if MINIMUMS in self.arrays else values
        return values.reshape(codes.shape)

    def _codes(self, place: int) -> jax.Array:
        """The codes in this place of their bytes, signed ones with their sign."""
        codes, per = self.rows_first(CODES), self._per_byte
        if per == 1:
            return codes
        width, kind = 8 // per, codes.dtype
        # A signed shift to the right copies the sign, an unsigned one fills with zeros.
        top = jnp.left_shift(codes, kind.type(8 - width - width * place))
        return jnp.right_shift(top, kind.type(8 - width))

    def _decode(self, codes: jax.Array) -> jax.Array:
        return codes.astype(_FLOAT32)

    def _factor(self, name: str, place: int) -> jax.Array:
        """A component's values in float32, to be broadcast over [..., groups, bytes of a group]."""
        [component] = (each for each in self.scheme.components if each.name == name)
        array = self._as_float(self.rows_first(name))
        if component.columns is None:
            return array[..., None, None]
        return self._by_order(array, place) if ORDER in self.arrays else array[..., None]

    def _as_float(self, values: jax.Array) -> jax.Array:
        return values.astype(_FLOAT32)

    def _by_order(self, values: jax.Array, place: int) -> jax.Array:
        order = self.arrays[ORDER][..., place :: self._per_byte]
        rows = values.ndim - order.ndim
        spread = jnp.expand_dims(order, tuple(range(order.ndim - 1, order.ndim - 1 + rows)))
        return jnp.take_along_axis(values, spread, axis=-1, mode="clip")[..., None, :]


def _sum(products: Iterable[jax.Array]) -> jax.Array:
    first, *others = products
    return sum(others, first)


@register("float8")
@dataclass(frozen=True)
class Float8(Grouped):
    """Codes that are floating-point numbers. uint8 scales are exponents."""

    def _bits(self) -> Self:
        """With codes as plain bytes: XLA's CPU compiler converts floats of 8 bits to wider ones even to slice them."""
        codes = jax.lax.bitcast_convert_type(self.arrays[CODES], jnp.uint8)
        return replace(self, arrays=self.arrays | {CODES: codes})

    def _decode(self, codes: jax.Array) -> jax.Array:
        if codes.dtype != jnp.uint8:
            return super()._decode(codes)
        # Looked up: XLA's conversion takes CPUs ten times as long.
        values = np.arange(256, dtype=np.uint8).view(jnp.dtype(self.scheme.components[0].dtype)).astype(np.float32)
        return jnp.asarray(values).at[codes.astype(jnp.int32)].get(mode="promise_in_bounds")

    def _as_float(self, values: jax.Array) -> jax.Array:
        return _powers_of_two(values) if values.dtype == jnp.uint8 else super()._as_float(values)


@register("e2m1", "nf4", "fp4")
@dataclass(frozen=True)
class Table(Float8):
    """Codes that a table has values for, the one of their kind."""

    def _bits(self) -> Self:
        return self

    def _decode(self, codes: jax.Array) -> jax.Array:
        values = jnp.asarray(VALUES[self.scheme.kind], _FLOAT32)
        return values.at[codes.astype(jnp.int32)].get(mode="promise_in_bounds")


def _powers_of_two(exponents: jax.Array) -> jax.Array:
    """2 ** (exponent - 127): the exponent's bits of a float32. 0 would be a number that processors may take for zero,
    and 255 stands for NaN."""
    found = jax.lax.bitcast_convert_type(exponents.astype(jnp.uint32) << 23, jnp.float32)
    return jnp.where(exponents == 255, jnp.nan, jnp.where(exponents == 0, jnp.float32(0), found))
