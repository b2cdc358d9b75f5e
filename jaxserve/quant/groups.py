# SPDX-License-Identifier: Apache-2.0
"""Weights whose codes share scales by row or by group of columns: integers, float8, and 4 bits through a table.

schemes.py has the formula and the layout of codes. Values are computed in float32. Products multiply by the weight in
the order of the bits that codes lie in, and put the activations into the same order, since to put neighbouring columns
side by side again takes CPUs longer than anything else about decoding.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jaxserve.quant.schemes import CODES, MINIMUMS, ORDER, ROW_SCALES, SCALES, ZEROS
from jaxserve.quant.tables import VALUES
from jaxserve.quant.tensor import QuantTensor, register
from pallas_kernels import dispatch
from pallas_kernels.on_cpu.grouped_matmul import grouped_matmul_by
from pallas_kernels.on_cpu.matmul import matmul as matmul_on_cpu

_FLOAT32 = jnp.dtype(jnp.float32)


@register("groups")
@dataclass(frozen=True)
class Grouped(QuantTensor):
    def dense(self, dtype: jnp.dtype) -> jax.Array:
        return jnp.swapaxes(self._planes(), -1, -2).reshape(self.shape).astype(dtype)

    def matmul(self, x: jax.Array, dtype: jnp.dtype) -> jax.Array:
        if dispatch.implementation() != "cpu":
            return super().matmul(x, dtype)
        return matmul_on_cpu(self._in_planes(x), self._matrix(self._planes())).astype(dtype)

    def grouped_matmul(self, x: jax.Array, offsets: jax.Array) -> jax.Array:
        if dispatch.implementation() != "cpu":
            return super().grouped_matmul(x, offsets)
        experts, *rows, _ = self.shape

        def weight(expert: jax.Array) -> jax.Array:
            arrays = {
                name: jax.lax.dynamic_index_in_dim(array, expert, keepdims=False) for name, array in self.arrays.items()
            }
            return self._matrix(type(self)(arrays, self.scheme)._planes())

        shape = (experts, math.prod(rows))
        y = grouped_matmul_by(weight, self._in_planes(x), offsets, shape=shape, out_dtype=_FLOAT32)
        return y.astype(x.dtype)

    @property
    def _per_byte(self) -> int:
        return self.scheme.components[0].columns or 1

    def _planes(self) -> jax.Array:
        """The weight as [..., places in a byte, bytes], float32."""
        values = self._decode(self._bits())
        if ZEROS in self.arrays:
            values = values - self._factor(ZEROS)
        values = values * self._factor(SCALES)
        if ROW_SCALES in self.arrays:
            values = values * self._factor(ROW_SCALES)
        return values + self._factor(MINIMUMS) if MINIMUMS in self.arrays else values

    def _matrix(self, planes: jax.Array) -> jax.Array:
        # Without the barrier, XLA decodes the weight inside of the product, once per use of a value.
        return jax.lax.optimization_barrier(planes.reshape(-1, self.shape[-1]))

    def _in_planes(self, x: jax.Array) -> jax.Array:
        """Activations with their columns in the order of `_planes`, float32."""
        tokens, columns = x.shape
        return jnp.swapaxes(x.reshape(tokens, -1, self._per_byte), 1, 2).reshape(tokens, columns).astype(_FLOAT32)

    def _bits(self) -> jax.Array:
        """The codes by their place in a byte, [..., places, bytes]; signed ones with their sign."""
        codes, per = self.rows_first(CODES), self._per_byte
        if per == 1:
            return codes[..., None, :]
        width, kind = 8 // per, codes.dtype
        # A signed shift to the right copies the sign, an unsigned one fills with zeros.
        places = [jnp.left_shift(codes, kind.type(8 - width - width * place)) for place in range(per)]
        return jnp.stack([jnp.right_shift(each, kind.type(8 - width)) for each in places], axis=-2)

    def _decode(self, codes: jax.Array) -> jax.Array:
        return codes.astype(_FLOAT32)

    def _factor(self, name: str) -> jax.Array:
        """A component's values in float32, to be broadcast over `_planes`."""
        [component] = (each for each in self.scheme.components if each.name == name)
        array = self._as_float(self.rows_first(name))
        if component.columns is None:
            return array[..., None, None]
        if ORDER in self.arrays:
            return self._by_order(array)
        return jnp.repeat(array, component.columns // self._per_byte, axis=-1)[..., None, :]

    def _as_float(self, values: jax.Array) -> jax.Array:
        return values.astype(_FLOAT32)

    def _by_order(self, values: jax.Array) -> jax.Array:
        order = self.arrays[ORDER]
        rows = values.ndim - order.ndim
        spread = jnp.expand_dims(order, tuple(range(order.ndim - 1, order.ndim - 1 + rows)))
        each = jnp.take_along_axis(values, spread, axis=-1, mode="clip")
        return jnp.swapaxes(each.reshape(*each.shape[:-1], -1, self._per_byte), -1, -2)


@register("float8")
@dataclass(frozen=True)
class Float8(Grouped):
    """Codes that are floating-point numbers. uint8 scales are exponents."""

    def _as_float(self, values: jax.Array) -> jax.Array:
        return _powers_of_two(values) if values.dtype == jnp.uint8 else super()._as_float(values)


@register("e2m1", "nf4", "fp4")
@dataclass(frozen=True)
class Table(Float8):
    """Codes that a table has values for, the one of their kind."""

    def _decode(self, codes: jax.Array) -> jax.Array:
        values = jnp.asarray(VALUES[self.scheme.kind], _FLOAT32)
        return values.at[codes.astype(jnp.int32)].get(mode="promise_in_bounds")


def _powers_of_two(exponents: jax.Array) -> jax.Array:
    """2 ** (exponent - 127): the exponent's bits of a float32. 0 would be a number that processors may take for zero,
    and 255 stands for NaN."""
    found = jax.lax.bitcast_convert_type(exponents.astype(jnp.uint32) << 23, jnp.float32)
    return jnp.where(exponents == 255, jnp.nan, jnp.where(exponents == 0, jnp.float32(0), found))
