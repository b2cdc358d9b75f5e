# SPDX-License-Identifier: Apache-2.0
"""A product of rows with a weight on CPUs, in the form that is fastest on this processor.

XLA's CPU compiler takes very different times for one product, depending on how it is written. In float32, a weight on
the left is read in place, while on the right it is packed first, which pays with many rows only. In bfloat16 and int8
it uses the processor's matrix units for a weight on the right, but has no fast product of a single vector: one row is
padded, on processors with large tiles perhaps to many. `Forms` holds where this processor changes from one form to
another, and `measure` finds that out.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

NARROW = ("bfloat16", "int8")
MEASURED = ("float32", *NARROW)
_MEASURED_ROWS = (4, 16, 64, 256)
_LEAST_ROWS = (2, 4, 8, 16)
_SHAPE = (4096, 1024)  # of the weight to measure with
_ROUNDS = 5
_CLEAR = 0.9  # what another form's time must be below, as a share of the default's, to be chosen: noise is not a reason


@dataclass(frozen=True, kw_only=True)
class Forms:
    """The rules by which forms are chosen, one for each dtype. The defaults suit the processors measured so far."""

    float32: int = 128  # with 2 to this many rows, the weight is on the left
    bfloat16: int = 2  # the least rows of a product; fewer are padded
    int8: int = 2


_forms = Forms()


def forms() -> Forms:
    """What products that are traced now are made by."""
    return _forms


def use_forms(chosen: Forms) -> None:
    """Make products by these rules from now on, in every thread. What is traced already stays as it is."""
    global _forms
    _forms = chosen


def matmul(rows: jax.Array, weight: jax.Array, *, chosen: Forms | None = None) -> jax.Array:
    """[m, k] times the transposed [n, k] of the same dtype: float32 [m, n], or int32 for int8. Slow in float16, for
    which XLA has no fast product."""
    chosen, count, name = chosen or _forms, rows.shape[0], weight.dtype.name
    if name in NARROW:
        rows = jnp.pad(rows, ((0, max(0, getattr(chosen, name) - count)), (0, 0)))
        return _weight_last(rows, weight)[:count]
    if weight.dtype == jnp.float32 and 1 < count <= chosen.float32:
        return _weight_first(rows, weight)
    return _weight_last(rows, weight)


def _weight_last(rows: jax.Array, weight: jax.Array) -> jax.Array:
    result = jnp.int32 if weight.dtype == jnp.int8 else jnp.float32
    return lax.dot_general(rows, weight, (((1,), (1,)), ((), ())), preferred_element_type=result)


def _weight_first(rows: jax.Array, weight: jax.Array) -> jax.Array:
    # The barriers keep XLA from swapping the operands back.
    columns = lax.optimization_barrier(rows.T)
    return lax.optimization_barrier(jnp.matmul(weight, columns, preferred_element_type=jnp.float32)).T


# --- measuring ------------------------------------------------------------------------------------------------------


def measure(name: str) -> int:
    """The rule for products in this dtype, one of MEASURED, that makes them fastest. Takes about half a second on two
    cores, for float32 longer."""
    return _first_up_to(name) if name == "float32" else _least_rows(name)


def _first_up_to(name: str) -> int:
    """The most rows up to which a weight on the left is faster, between the numbers that are tried."""
    sides = Forms(float32=max(_MEASURED_ROWS)), Forms(float32=0)
    best = 1
    for rows in _MEASURED_ROWS:
        first, last = _times(name, rows, sides)
        # At the default's own side of its limit, the other side has to be clearly faster.
        margin = 1 / _CLEAR if rows <= Forms.float32 else _CLEAR
        if first > last * margin:
            break
        best = rows * 2
    return best


def _least_rows(name: str) -> int:
    choices = [Forms(**{name: least}) for least in _LEAST_ROWS]
    default, *others = _times(name, 1, choices)
    time, least = min(zip((default * _CLEAR, *others), _LEAST_ROWS, strict=True))
    return least if time < default else getattr(Forms, name)


def _times(name: str, rows: int, choices: Sequence[Forms]) -> list[float]:
    """Seconds of a product of this many rows by each of the rules: the least of a few rounds in which they take turns,
    because other work on the machine only ever adds time."""
    x, weight = jnp.ones((rows, _SHAPE[1]), name), jnp.ones(_SHAPE, name)
    runs = [_run(x, weight, each) for each in choices]
    best = [float("inf")] * len(runs)
    for turn in range(_ROUNDS + 1):
        for place, run in enumerate(runs):
            began = time.perf_counter()
            run().block_until_ready()
            if turn:  # the first warms up
                best[place] = min(best[place], time.perf_counter() - began)
    return best


def _run(x: jax.Array, weight: jax.Array, chosen: Forms) -> Callable[[], Any]:
    def product(x: jax.Array, weight: jax.Array) -> jax.Array:
        return matmul(x, weight, chosen=chosen)

    program = jax.jit(product).lower(x, weight).compile()
    return lambda: program(x, weight)
