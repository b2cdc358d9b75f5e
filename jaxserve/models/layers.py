# SPDX-License-Identifier: Apache-2.0
"""The building blocks of every layer: linear maps, norms, embeddings, activations."""

import jax
import jax.numpy as jnp
from flax import nnx

from jaxserve.models.linear import activations, matmul, take
from jaxserve.models.spec import Activation, ClampedSwiglu, Norm
from jaxserve.models.weight import AxisSizes, param, weight


def lift(vector: jax.Array, like: jax.Array) -> jax.Array:
    """Prepend axes of size 1, up to the rank of `like`."""
    return jax.lax.expand_dims(vector, range(like.ndim - vector.ndim))


class Linear(nnx.Module):
    """y[..., *outs] = sum over *ins of x[..., *ins] kernel[*outs, *ins] (+ bias[*outs])."""

    def __init__(self, outs: AxisSizes, ins: AxisSizes, *, dtype: jnp.dtype, bias: bool = False) -> None:
        self.outs, self.ins = tuple(outs), tuple(ins)
        self.kernel = weight(outs, ins, dtype)
        self.bias = param(outs, dtype) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        y = matmul(x, self.kernel, ins=len(self.ins), outs=self.outs)
        return y if self.bias is None else y + lift(self.bias[...].astype(y.dtype), y)


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

    def __init__(self, rows: AxisSizes, width: AxisSizes, *, dtype: jnp.dtype) -> None:
        self.dtype = dtype
        self.weight = weight(rows, width, dtype)

    def __call__(self, ids: jax.Array) -> jax.Array:
        # Callers check ids on the host; an invalid id must give NaN, not another token's row.
        rows = take(self.weight, ids, dtype=activations(self.dtype))
        return rows.astype(activations(rows.dtype))


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
