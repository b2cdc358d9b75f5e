# SPDX-License-Identifier: Apache-2.0
"""Rotary position embeddings: computes a Rope's angles, and rotates queries and keys by them.

If the angles depend on a sequence's length (dynamic, longrope), the length is given per token and is constant over a
request's life, so that chunked and whole prefill, decode and recomputation use the same angles.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.models.spec import Dynamic, LinearScaling, Llama3, LongRope, Rope, Yarn

Angles = tuple[jax.Array, jax.Array]  # cos and sin, float32 [..., dim / 2]


def angles(rope: Rope, positions: jax.Array, lengths: jax.Array | None = None) -> Angles:
    """`lengths`, shaped like `positions`, is required if `rope.needs_length`."""
    if rope.needs_length and lengths is None:
        raise ValueError("this RoPE needs the sequence length of every token")
    turned = positions.astype(jnp.float32)[..., None] * _frequencies(rope, positions.ndim, lengths)
    return jnp.cos(turned) * rope.magnitude, jnp.sin(turned) * rope.magnitude


def rotate(x: jax.Array, turn: Angles, *, interleaved: bool) -> jax.Array:
    """Rotate x [..., heads, dim] by angles [..., dim' / 2], dim' <= dim; the dims after dim' are unchanged."""
    cos, sin = (part[..., None, :].astype(x.dtype) for part in turn)
    turned = 2 * cos.shape[-1]
    head, tail = x[..., :turned], x[..., turned:]
    if interleaved:
        a, b = head[..., 0::2], head[..., 1::2]
        head = jnp.stack((a * cos - b * sin, b * cos + a * sin), axis=-1).reshape(head.shape)
    else:
        a, b = jnp.split(head, 2, axis=-1)
        head = jnp.concatenate((a * cos - b * sin, b * cos + a * sin), axis=-1)
    return jnp.concatenate((head, tail), axis=-1) if tail.shape[-1] else head


def _frequencies(rope: Rope, ndim: int, lengths: jax.Array | None) -> jax.Array:
    """Radians per position, with `ndim` axes before the dims, of size 1 unless they depend on the length."""
    scaling = rope.scaling
    powers = np.arange(0, rope.dim, 2, dtype=np.float32) / np.float32(rope.dim)
    plain = 1.0 / np.float32(rope.base) ** powers

    def lifted(values: np.ndarray) -> jax.Array:
        return jnp.asarray(values, jnp.float32).reshape((1,) * ndim + (-1,))

    match scaling:
        case None:
            return lifted(plain)
        case LinearScaling():
            return lifted(plain / np.float32(scaling.factor))
        case Llama3():
            return lifted(_llama3(plain, scaling))
        case Yarn():
            return lifted(_yarn(plain, rope, scaling))
        case Dynamic():
            assert lengths is not None
            length = jnp.maximum(lengths, scaling.original).astype(jnp.float32)[..., None]
            growth = scaling.factor * length / scaling.original - (scaling.factor - 1)
            base = rope.base * growth ** (rope.dim / (rope.dim - 2))
            return 1.0 / base ** lifted(powers)
        case LongRope():
            assert lengths is not None
            short, long = (
                lifted(plain / np.asarray(divisors, np.float32)) for divisors in (scaling.short, scaling.long)
            )
            return jnp.where(lengths[..., None] > scaling.original, long, short)


def _llama3(plain: np.ndarray, scaling: Llama3) -> np.ndarray:
    """Divide the frequencies of long waves by `factor`, keep those of short ones, and blend those in between."""
    turns = scaling.original * plain / (2 * math.pi)  # within the original context
    blend = (turns - scaling.low_freq) / (scaling.high_freq - scaling.low_freq)
    slowed = plain / scaling.factor
    between = (1 - blend) * slowed + blend * plain
    return np.where(turns < scaling.low_freq, slowed, np.where(turns > scaling.high_freq, plain, between))


def _yarn(plain: np.ndarray, rope: Rope, scaling: Yarn) -> np.ndarray:
    def dim_of(turns: float) -> float:
        """The dim with a wave that makes this many turns within the original context."""
        return rope.dim * math.log(scaling.original / (turns * 2 * math.pi)) / (2 * math.log(rope.base))

    low, high = dim_of(scaling.beta_fast), dim_of(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dim - 1)
    high = high + 0.001 if low == high else high
    slowed_share = np.clip((np.arange(rope.dim // 2, dtype=np.float32) - low) / (high - low), 0, 1)
    return plain / scaling.factor * slowed_share + plain * (1 - slowed_share)
