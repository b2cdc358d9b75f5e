# SPDX-License-Identifier: Apache-2.0
"""The building blocks of every layer. Weights have the layout of Hugging Face, outputs first, so that loading copies
without transposing, and a tied embedding serves as the output head unchanged.

Every parameter has logical axis names; parallel.mesh defines how these are sharded.
"""

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from jaxserve.models.spec import Activation, ClampedSwiglu, Norm
from jaxserve.parallel import mesh
from pallas_kernels import dispatch

# Up to this many tokens a product with the weights on the left is faster. Measured on two CPU cores with AVX-512, for
# all layers of a 110M model: 14 instead of 19 ms with 8 tokens, 24 instead of 29 with 32, 66 instead of 75 with 128,
# but 130 instead of 125 with 256.
FEW_TOKENS = 128

AxisSizes = Mapping[str, int]  # logical axis -> size, in order


def param(sizes: AxisSizes, dtype: jnp.dtype) -> nnx.Param[jax.Array]:
    # Decoders are only built abstractly, so nothing is allocated here.
    return nnx.Param(jnp.zeros(tuple(sizes.values()), dtype), axes=tuple(sizes))


def lift(vector: jax.Array, like: jax.Array) -> jax.Array:
    """Prepend axes of size 1, up to the rank of `like`."""
    return jax.lax.expand_dims(vector, range(like.ndim - vector.ndim))


class Linear(nnx.Module):
    """y[..., *outs] = sum over *ins of x[..., *ins] kernel[*outs, *ins] (+ bias[*outs])."""

    def __init__(self, outs: AxisSizes, ins: AxisSizes, *, dtype: jnp.dtype, bias: bool = False) -> None:
        self.outs, self.ins = tuple(outs), tuple(ins)
        self.kernel = param({**outs, **ins}, dtype)
        self.bias = param(outs, dtype) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        y = contract(x, self.kernel[...], count=len(self.ins), outs=self.outs)
        return y if self.bias is None else y + lift(self.bias[...], y)


def contract(
    x: jax.Array, kernel: jax.Array, *, count: int, outs: tuple[str, ...], dtype: jnp.dtype | None = None
) -> jax.Array:
    """Contract the last `count` axes of both; an all-reduce if these are sharded."""
    lead = x.ndim - count
    dtype = jnp.dtype(dtype or x.dtype)
    if dispatch.implementation() == "cpu" and not mesh.in_mesh():
        return _contract_on_cpu(x, kernel, lead, count, dtype)
    pairs = tuple(range(lead, x.ndim)), tuple(range(kernel.ndim - count, kernel.ndim))
    return jax.lax.dot_general(
        x,
        kernel,
        (pairs, ((), ())),
        preferred_element_type=dtype,
        out_sharding=mesh.out_sharding(x, lead, outs),
    )


def _contract_on_cpu(x: jax.Array, kernel: jax.Array, lead: int, count: int, dtype: jnp.dtype) -> jax.Array:
    """The same as a single matrix product. For a kernel with more than two axes, XLA's CPU compiler makes a transposed
    copy in every call, which takes ten times as long as the product with one token."""
    outs, ins = kernel.shape[: kernel.ndim - count], kernel.shape[kernel.ndim - count :]
    tokens = x.reshape(-1, math.prod(ins))
    matrix = kernel.reshape(math.prod(outs), math.prod(ins))
    if 1 < tokens.shape[0] <= FEW_TOKENS:
        # Weights on the left are read in place; on the right they are packed first, even for few tokens. The barriers
        # keep XLA from swapping the operands back.
        columns = jax.lax.optimization_barrier(tokens.T)
        y = jnp.matmul(matrix, columns, preferred_element_type=dtype)
        y = jax.lax.optimization_barrier(y).T
    else:
        y = jax.lax.dot_general(tokens, matrix, (((1,), (1,)), ((), ())), preferred_element_type=dtype)
    return y.reshape(*x.shape[:lead], *outs)


class Normalize(nnx.Module):
    """RMS or layer norm over the last len(sizes) - own axes, with weights of shape `sizes`."""

    def __init__(self, spec: Norm, sizes: AxisSizes, *, dtype: jnp.dtype, own: int = 0) -> None:
        self.spec, self.count = spec, len(sizes) - own
        self.weight = param(sizes, dtype) if spec.weight else None
        self.bias = param(sizes, dtype) if spec.bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        over = tuple(range(x.ndim - self.count, x.ndim))
        y = x.astype(jnp.float32)
        if self.spec.kind == "layer":
            y = y - jnp.mean(y, axis=over, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=over, keepdims=True) + self.spec.eps)
        if self.weight is not None:
            y = y * lift(self.weight[...].astype(jnp.float32) + self.spec.offset, y)
        if self.bias is not None:
            y = y + lift(self.bias[...].astype(jnp.float32), y)
        return y.astype(x.dtype)


class Embedding(nnx.Module):
    """Token embeddings by id; also the output head if the two are tied."""

    def __init__(self, sizes: AxisSizes, *, dtype: jnp.dtype) -> None:
        self.axes = tuple(sizes)
        self.weight = param(sizes, dtype)

    def __call__(self, ids: jax.Array) -> jax.Array:
        # Callers check ids on the host; an invalid id must give NaN, not another token's row.
        return (
            self.weight[...]
            .at[ids]
            .get(
                mode="fill",
                fill_value=jnp.nan,
                wrap_negative_indices=False,
                out_sharding=mesh.out_sharding(ids, ids.ndim, self.axes[1:]),
            )
        )


def activate(name: Activation, x: jax.Array) -> jax.Array:
    match name:
        case "silu":
            return jax.nn.silu(x)
        case "gelu":
            return jax.nn.gelu(x, approximate=False)
        case "gelu_tanh":
            return jax.nn.gelu(x, approximate=True)
        case "gelu_quick":
            return x * jax.nn.sigmoid(1.702 * x)
        case "relu":
            return jax.nn.relu(x)
        case "relu2":
            return jnp.square(jax.nn.relu(x))
        case ClampedSwiglu():
            raise ValueError("a clamped SwiGLU needs a gate")


def gate(name: Activation, gated: jax.Array, up: jax.Array) -> jax.Array:
    if isinstance(name, ClampedSwiglu):
        gated, up = jnp.minimum(gated, name.limit), jnp.clip(up, -name.limit, name.limit)
        return gated * jax.nn.sigmoid(name.alpha * gated) * (up + 1)
    return activate(name, gated) * up
