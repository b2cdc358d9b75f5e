# SPDX-License-Identifier: Apache-2.0
"""Section `machine`: the copy bandwidth and matmul rate that all other times are compared with, and the GPU's state."""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import facts
from benchmarks.gpu.book import Page, Row

COLUMNS = ("us", "spread", "gbps", "tflops")


def _per_call(function: Callable[[Any], Any], start: Any, *, few: int, many: int, repeats: int) -> tuple[float, float]:
    """Microseconds of `x = function(x)`, from the slope between few and many consecutive calls, and their spread."""

    def seconds(calls: int) -> float:
        x = start
        started = time.perf_counter()
        for _ in range(calls):
            x = function(x)
        jax.block_until_ready(x)
        return time.perf_counter() - started

    seconds(many)
    per_call = sorted(1e6 * (-seconds(few) + seconds(many)) / (many - few) for _ in range(repeats))
    us = float(np.median(per_call))
    low, high = np.quantile(per_call, (0.25, 0.75))
    return us, float((high - low) / us) if us > 0 else float("inf")


def _copy(elements: int) -> Row:
    x = jax.random.normal(jax.random.key(1), (elements,), jnp.float32)
    us, spread = _per_call(jax.jit(lambda x: -x), x, few=2, many=10, repeats=9)
    return {"us": us, "spread": spread, "gbps": 2 * x.nbytes / us / 1e3}


def _read(elements: int) -> Row:
    """A pass that only reads, which is closer to decode attention than a copy is."""
    x = jax.random.normal(jax.random.key(1), (elements,), jnp.float32)
    # Each call depends on the maximum of the one before; otherwise the calls would be independent.
    largest = jax.jit(lambda last, x: jnp.max(x + last * 0.5))
    us, spread = _per_call(lambda last: largest(last, x), jnp.float32(0), few=2, many=10, repeats=9)
    return {"us": us, "spread": spread, "gbps": x.nbytes / us / 1e3}


def _matmul(side: int, dtype: str) -> Row:
    a, b = (jax.random.normal(jax.random.key(i), (side, side), jnp.float32) for i in range(2))
    a, b = a.astype(jnp.dtype(dtype)), (b * side**-0.5).astype(jnp.dtype(dtype))  # keeps the products near one
    product = jax.jit(jnp.matmul)
    us, spread = _per_call(lambda a: product(a, b), a, few=4, many=16, repeats=9)
    return {"us": us, "spread": spread, "tflops": 2 * side**3 / us / 1e6}


def _dispatch() -> Row:
    """The smallest possible call, repeated: the cost of a launch from Python."""
    us, spread = _per_call(jax.jit(lambda x: x + 1), jnp.zeros((8,), jnp.int32), few=20, many=220, repeats=5)
    return {"us": us, "spread": spread}


def run(page: Page) -> None:
    tiny = page.settings.tiny
    elements, side = (2**12, 64) if tiny else (2**29, 8192)
    cases: list[tuple[str, Callable[[], Row]]] = [
        ("copy", lambda: _copy(elements)),
        ("matmul bfloat16", lambda: _matmul(side, "bfloat16")),
        ("read", lambda: _read(elements)),
        ("matmul float32", lambda: _matmul(side, "float32")),
        ("dispatch", _dispatch),
        ("nvidia-smi", lambda: {"state": facts.nvidia_smi()}),
    ]
    page.each(cases, lambda case: case[1](), name=lambda case: case[0])
