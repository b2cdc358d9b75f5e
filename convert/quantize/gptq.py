# SPDX-License-Identifier: Apache-2.0
"""GPTQ: columns are rounded one after another, and what rounding lost is made up for by the columns that follow.

With inputs x and H = sum of x x', the loss of rounding column k is smallest if the later columns change by its error
times row k of U, where inverse(H) = U' U and U is upper triangular. Scales and zero points of a group of columns are
those of its values when it is their turn. https://arxiv.org/abs/2210.17323
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from convert.files.reader import Array
from jaxserve.quant import packing, rounding
from jaxserve.quant.scheme import Scheme
from jaxserve.quant.schemes import CODES, SCALES, ZEROS

_DAMPING = 0.01  # of the mean of H's diagonal, which is added to it


def components(weight: Array, gram: Any, scheme: Scheme) -> dict[str, Array]:
    """The components of a float32 matrix [rows, columns], of whose inputs `gram` is H."""
    upper, dead = factor(np.asarray(gram, np.float64))
    weight = np.where(dead, np.float32(0), weight)
    codes, scales, zeros = (np.asarray(each) for each in _sweep(weight, upper.astype(np.float32), scheme=scheme))
    return {CODES: packing.pack(codes, 4), SCALES: scales, ZEROS: zeros}


def factor(gram: Array) -> tuple[Array, Array]:
    """U, and which inputs are always zero."""
    dead = np.diag(gram) <= 0
    damped = gram + np.diag(np.where(dead, 1.0, 0.0))
    more = _DAMPING * np.mean(np.diag(gram)) or 1.0
    while True:
        try:
            # R R' = H with R upper triangular, by the Cholesky factor of H in reverse; then U = inverse(R).
            reverse = np.linalg.cholesky((damped + more * np.eye(len(gram)))[::-1, ::-1])[::-1, ::-1]
            return np.triu(np.linalg.inv(reverse)), dead
        except np.linalg.LinAlgError:
            more *= 10


@partial(jax.jit, static_argnames="scheme")
def _sweep(weight: jax.Array, upper: jax.Array, *, scheme: Scheme) -> tuple[jax.Array, jax.Array, jax.Array]:
    group = scheme.components[1].columns
    assert group is not None
    rows, columns = weight.shape
    numbers = jnp.arange(columns)[None]

    def of_group(i: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        rest, codes, scales, zeros = state
        first = i * group
        part = jax.lax.dynamic_slice_in_dim(rest, first, group, axis=1)
        mine = jax.lax.dynamic_slice_in_dim(upper, first, group, axis=0)
        shared = rounding.of_ranges(scheme, part, jnp)
        near = jax.lax.dynamic_slice_in_dim(mine, first, group, axis=1)
        found, errors = _in_group(part, near, shared[SCALES][:, 0].astype(jnp.float32), shared[ZEROS][:, 0])
        later = jnp.where(numbers >= first + group, mine, 0)
        rest = rest - jnp.matmul(errors, later, precision=jax.lax.Precision.HIGHEST)
        place = partial(jax.lax.dynamic_update_slice_in_dim, axis=1)
        return (
            rest,
            place(codes, found, first),
            place(scales, shared[SCALES], i),
            place(zeros, shared[ZEROS], i),
        )

    groups = columns // group
    scales = jnp.zeros((rows, groups), scheme.components[1].dtype)
    start = weight, jnp.zeros(weight.shape, jnp.uint8), scales, jnp.zeros((rows, groups), jnp.uint8)
    return jax.lax.fori_loop(0, groups, of_group, start)[1:]


def _in_group(part: jax.Array, upper: jax.Array, scale: jax.Array, zero: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The codes of a group of columns, and the errors that later groups are to make up for."""
    safe, middle = jnp.where(scale > 0, scale, 1), zero.astype(jnp.float32)

    def of_column(k: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        part, codes, errors = state
        value = part[:, k]
        code = jnp.clip(jnp.rint(value / safe) + middle, 0, 15)
        error = (value - (code - middle) * scale) / upper[k, k]
        return part - error[:, None] * upper[k][None, :], codes.at[:, k].set(code), errors.at[:, k].set(error)

    nothing = jnp.zeros(part.shape, jnp.float32)
    _, codes, errors = jax.lax.fori_loop(0, part.shape[1], of_column, (part, nothing, nothing))
    return codes.astype(jnp.uint8), errors
