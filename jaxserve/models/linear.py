# SPDX-License-Identifier: Apache-2.0
"""All products of activations with weights. A weight is one array or has components; see weight.py.

Weights have the layout of Hugging Face, outputs first, so that loading copies without transposing, and a tied embedding
serves as the output head unchanged.
"""

import math
import re
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxserve.models.weight import Components, Weight
from jaxserve.parallel import mesh
from jaxserve.quant.tensor import QuantTensor
from pallas_kernels import dispatch
from pallas_kernels.grouped_matmul import grouped_matmul
from pallas_kernels.on_cpu.matmul import matmul as matmul_on_cpu


def activations(dtype: jnp.dtype) -> jnp.dtype:
    """The dtype of activations beside weights of this dtype. On a CPU float32: XLA computes in it there anyway, and
    would round to 16 bits after every operation."""
    return jnp.dtype(jnp.float32) if dispatch.implementation() == "cpu" and not mesh.in_mesh() else dtype


def matmul(
    x: jax.Array, weight: Weight, *, ins: int = 1, outs: tuple[str, ...], dtype: jnp.dtype | None = None
) -> jax.Array:
    """y[..., *outs] = sum over *ins of x[..., *ins] weight[*outs, *ins], as `dtype` (default: that of x). An all-reduce
    if the `ins` axes, which are the last ones of both, are sharded."""
    lead = x.ndim - ins
    dtype = jnp.dtype(dtype or x.dtype)
    if isinstance(weight, Components):
        return _matmul_components(x, weight, lead, outs, dtype)
    kernel = weight[...]
    x = x.astype(kernel.dtype)
    if dispatch.implementation() == "cpu" and not mesh.in_mesh():
        return _as_matrices(x, kernel, lead, ins, dtype)
    pairs = tuple(range(lead, x.ndim)), tuple(range(kernel.ndim - ins, kernel.ndim))
    return jax.lax.dot_general(
        x,
        kernel,
        (pairs, ((), ())),
        preferred_element_type=dtype,
        out_sharding=mesh.out_sharding(x, lead, outs),
    )


def _as_matrices(x: jax.Array, kernel: jax.Array, lead: int, count: int, dtype: jnp.dtype) -> jax.Array:
    """The same as a single matrix product. For a kernel with more than two axes, XLA's CPU compiler makes a transposed
    copy in every call, which takes ten times as long as the product with one token."""
    outs, ins = kernel.shape[: kernel.ndim - count], kernel.shape[kernel.ndim - count :]
    tokens = x.reshape(-1, math.prod(ins))
    matrix = kernel.reshape(math.prod(outs), math.prod(ins))
    return matmul_on_cpu(tokens, matrix).astype(dtype).reshape(*x.shape[:lead], *outs)


def _matmul_components(
    x: jax.Array, weight: Components, lead: int, outs: tuple[str, ...], dtype: jnp.dtype
) -> jax.Array:
    def local(x: jax.Array, tensor: QuantTensor) -> jax.Array:
        *rows, columns = tensor.shape
        y = tensor.matmul(x.reshape(-1, columns), dtype).reshape(*x.shape[:lead], *rows)
        return mesh.sum_over(y, *weight.ins)

    leading = mesh.leading_spec(x, lead)
    specs = P(*leading, *mesh.partition(weight.ins)), weight.cut()
    return mesh.island(local, specs, P(*leading, *mesh.partition(outs)))(x, weight.tensor())


def matmul_each(expression: str, x: jax.Array, weight: Weight) -> jax.Array:
    """An einsum of activations with a stack of weights, one for each head."""
    kernel, dtype = dense(weight, x.dtype) if isinstance(weight, Components) else weight[...], x.dtype
    x = x.astype(kernel.dtype)
    if x.dtype == dtype:
        return jnp.einsum(expression, x, kernel, preferred_element_type=dtype)
    # XLA's CPU compiler fails at products with wider results, unless the heads of both come first.
    inputs, kernels, outputs = re.split(",|->", expression)
    heads = kernels[0]
    if heads in inputs:
        x = jax.lax.optimization_barrier(jnp.moveaxis(x, inputs.index(heads), 0))
        inputs = heads + inputs.replace(heads, "")
    expression = f"{inputs},{kernels}->{heads}{outputs.replace(heads, '')}"
    return jnp.moveaxis(jnp.einsum(expression, x, kernel, preferred_element_type=dtype), 0, outputs.index(heads))


def matmul_grouped(x: jax.Array, weight: "jax.Array | QuantTensor", offsets: jax.Array) -> jax.Array:
    """Rows of x, sorted by expert, each times its expert's weight, with all outputs on one axis. Runs inside a
    mesh.island, on a weight that `as_argument` returned."""
    if isinstance(weight, QuantTensor):
        return weight.grouped_matmul(x, offsets)
    experts, *_, columns = weight.shape
    return grouped_matmul(x.astype(weight.dtype), weight.reshape(experts, -1, columns), offsets, out_dtype=x.dtype)


def as_argument(weight: Weight, axes: tuple[str | None, ...]) -> tuple[Any, Any]:
    """A weight with these axes as the argument of a mesh.island, and how it is sharded there."""
    if isinstance(weight, Components):
        return weight.tensor(), weight.cut()
    return weight[...], mesh.partition(axes)


def take(weight: Weight, ids: jax.Array, *, dtype: jnp.dtype) -> jax.Array:
    """The weight's rows with these ids, as `dtype` if it has components; NaN for an invalid id, which must not give
    another row."""
    leading = mesh.leading_spec(ids, ids.ndim)

    def pick(array: jax.Array, ids: jax.Array) -> jax.Array:
        sharding = P(*leading, *(None,) * (array.ndim - 1)) if mesh.in_mesh() else None
        floats = jnp.issubdtype(array.dtype, jnp.floating)
        return array.at[ids].get(
            mode="fill",
            fill_value=jnp.nan if floats else 0,
            wrap_negative_indices=False,
            out_sharding=sharding,
        )

    if not isinstance(weight, Components):
        return pick(weight[...], ids)
    tensor = weight.tensor()
    rows = tensor.shape[0]
    picked = tensor.take(ids, pick)

    def values(picked: QuantTensor, ids: jax.Array) -> jax.Array:
        real = (ids >= 0) & (ids < rows)
        return jnp.where(real[..., None], picked.dense(dtype), jnp.nan)

    specs = jax.tree.map(lambda array: P(*jax.typeof(array).sharding.spec) if mesh.in_mesh() else P(), (picked, ids))
    return mesh.island(values, specs, P(*leading, None))(picked, ids)


def dense(weight: Components, dtype: jnp.dtype) -> jax.Array:
    """The weight as one array, [*outs, columns], sharded as such."""

    def local(tensor: QuantTensor) -> jax.Array:
        return tensor.dense(dtype)

    return mesh.island(local, (weight.cut(),), mesh.partition((*weight.outs, weight.ins[0])))(weight.tensor())
