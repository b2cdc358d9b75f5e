# SPDX-License-Identifier: Apache-2.0
"""The feed-forward network of a dense block."""

import jax
import jax.numpy as jnp
from flax import nnx

from jaxserve.models.layers import Linear, activate, gate
from jaxserve.models.mesh_fit import Fit
from jaxserve.models.spec import Mlp


class FeedForward(nnx.Module):
    def __init__(self, spec: Mlp, hidden: int, fitted: Fit, *, dtype: jnp.dtype) -> None:
        self.spec = spec
        model, width = {"hidden": hidden}, {"mlp": fitted.columns(spec.width)}
        if spec.gated:
            self.gate_up = Linear({"parts": 2} | width, model, bias=spec.bias, dtype=dtype)
        else:
            self.up = Linear(width, model, bias=spec.bias, dtype=dtype)
        self.down = Linear(model, width, bias=spec.down_bias, dtype=dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        if not self.spec.gated:
            return self.down(activate(self.spec.activation, self.up(x)))
        both = self.gate_up(x)
        return self.down(gate(self.spec.activation, both[..., 0, :], both[..., 1, :]))
