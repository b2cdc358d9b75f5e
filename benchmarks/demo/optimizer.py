# SPDX-License-Identifier: Apache-2.0
"""Adam with gradient clipping and a learning rate that warms up linearly and decays to zero along a cosine."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxserve.models.decoder import Params

State = dict[str, Any]  # "params"; "mean" and "square" of gradients, in the same shape; "count" of steps
BETAS = 0.9, 0.97
WARMUP = 100  # steps
MAX_NORM = 1.0  # of the gradient


def start(params: Params) -> State:
    mean, square = (jax.tree.map(jnp.zeros_like, params) for _ in range(2))
    return {"params": params, "mean": mean, "square": square, "count": jnp.float32(0)}


def step(state: State, grads: Params, *, steps: jax.Array | float, peak: jax.Array | float) -> State:
    """The state after one of `steps` steps; `peak` is the highest learning rate."""
    count, (first, second) = state["count"] + 1, BETAS
    rate = peak * jnp.minimum(count / WARMUP, 0.5 + 0.5 * jnp.cos(jnp.pi * (count - 1) / steps))
    norm = jnp.sqrt(sum(jnp.sum(grad * grad) for grad in jax.tree.leaves(grads)))
    grads = jax.tree.map(lambda grad: grad * jnp.minimum(1.0, MAX_NORM / norm), grads)
    mean = jax.tree.map(lambda old, grad: first * old + (1 - first) * grad, state["mean"], grads)
    square = jax.tree.map(lambda old, grad: second * old + (1 - second) * grad * grad, state["square"], grads)

    def moved(value: jax.Array, mean: jax.Array, square: jax.Array) -> jax.Array:
        # Bias correction: both means start at zero.
        return value - rate * (mean / (1 - first**count)) / (jnp.sqrt(square / (1 - second**count)) + 1e-8)

    return {
        "params": jax.tree.map(moved, state["params"], mean, square),
        "mean": mean,
        "square": square,
        "count": count,
    }
