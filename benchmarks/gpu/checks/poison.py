# SPDX-License-Identifier: Apache-2.0
"""Runs an op with memory full of garbage, so that elements that it does not write are noticed."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

_GARBAGE = (float("nan"), -31000.0)


class Poisoned(NamedTuple):
    first: Any  # pytree of numpy arrays
    repeatable: bool  # both runs gave the same bits, whatever the garbage
    aliased: bool  # the outputs were really written over the garbage


def same_bits(a: Any, b: Any) -> bool:
    return all(
        x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes()
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def _filled(shape: jax.ShapeDtypeStruct, value: float) -> jax.Array:
    if jnp.issubdtype(shape.dtype, jnp.floating):
        return jnp.full(shape.shape, value, shape.dtype)
    whole = -31000 if np.isnan(value) else 12345
    return jnp.full(shape.shape, whole % 2 if shape.dtype == jnp.bool_ else whole, shape.dtype)


def run(function: Callable[..., Any], arguments: Any) -> Poisoned:
    """Calls `function(arguments)` twice. The outputs are written over donated arrays of garbage. Garbage of the
    temporaries' size is freed just before, so that the allocator reuses it for them."""
    shapes = jax.eval_shape(function, arguments)

    def into(garbage: Any, arguments: Any) -> Any:
        del garbage  # donated: XLA puts the outputs there
        return function(arguments)

    compiled = jax.jit(into, donate_argnums=0, keep_unused=True).lower(shapes, arguments).compile()
    memory: Any = compiled.memory_analysis()
    results = []
    for value in _GARBAGE:
        garbage = jax.tree.map(lambda shape, value=value: _filled(shape, value), shapes)
        spoiled = [jnp.full((max(memory.temp_size_in_bytes, 4) // 4,), value, jnp.float32) for _ in range(2)]
        jax.block_until_ready((garbage, spoiled))
        del spoiled
        results.append(jax.tree.map(np.asarray, compiled(garbage, arguments)))
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))
    return Poisoned(results[0], same_bits(*results), memory.alias_size_in_bytes >= size)
