# SPDX-License-Identifier: Apache-2.0
"""Section `time_quant`: products of few rows with weights of 4 and 8 bits, at the sizes of a Llama of 8 billion.

The floor: codes, scales and zero points, read once. A call includes two small kernels beside that of the product: one
puts x in its order, one adds the sums of its splits. In a model both are mostly part of operations beside it.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.gpu.book import Page
from benchmarks.gpu.times import timing
from benchmarks.gpu.times.attention import of_kind, spec
from benchmarks.gpu.times.timing import Aim, Arrays, Timed
from pallas_kernels.quant_matmul import quant_matmul
from pallas_kernels.tuning import QuantTiles, Tiles


@dataclass(frozen=True)
class Kind:
    """How a weight is stored."""

    name: str
    codes: str
    bits: int
    group: int | None  # None: one group has all columns
    zeros: bool = False


AWQ = Kind("uint4 in 128", "uint8", 4, 128, zeros=True)
GPTQ = Kind("int4 in 128", "int8", 4, 128)
FINE = Kind("uint4 in 32", "uint8", 4, 32, zeros=True)
INT8 = Kind("int8 by row", "int8", 8, None)
FP8 = Kind("float8 by row", "float8_e4m3fn", 8, None)
FP8_GROUPS = Kind("float8 in 128", "float8_e4m3fn", 8, 128)
PRODUCTS = {"out": (4096, 4096), "down": (4096, 14336), "up": (14336, 4096), "qkv": (6144, 4096)}


def target(kind: Kind, rows: int) -> Aim | None:
    """What the design aims at, where it does."""
    if kind.bits == 8:
        return Aim("copy_pct", 90) if rows <= 64 else None
    if kind.group not in (128, None):
        return None
    return Aim("copy_pct", 80) if rows <= 16 else Aim("copy_pct", 60) if rows <= 64 else None


def quant_case(kind: Kind, n: int, k: int, rows: int, *, tiles: Tiles | None = None) -> Timed:
    """What comes of comparing an output is added to the next call's x as a zero."""
    groups = 1 if kind.group is None else k // kind.group
    width = k * kind.bits // 8
    size = n * (width + groups * (3 if kind.zeros else 2))
    sets = timing.sets_needed(size)
    stored = "int8" if kind.codes == "uint8" else kind.codes  # random numbers fill the range of int8

    def arrays(pools: tuple[jax.Array, ...]) -> Arrays:
        codes = jax.lax.bitcast_convert_type(pools[0], jnp.dtype(kind.codes))
        factors = jnp.full((n, groups), 1 / 64, jnp.float16)
        zeros = (jnp.full((n, groups), 8, jnp.uint8),) if kind.zeros else ()
        x = jax.random.normal(jax.random.key(3), (rows, k), jnp.float32).astype(jnp.bfloat16)
        # Each set has separate factors: shared ones would stay in the cache and cost no memory traffic.
        weights = [(codes[i], *(each + each.dtype.type(0) for each in (factors, *zeros))) for i in range(sets)]
        return Arrays(jnp.zeros((), jnp.bfloat16), x, weights)

    def step(zero: jax.Array, x: jax.Array, weight: Any) -> jax.Array:
        out = quant_matmul(x + zero, *weight, tiles=of_kind(QuantTiles, tiles))
        # All of it, or XLA would add up only the sums of what is compared.
        return (jax.lax.optimization_barrier(out)[0, 0] > 1e30).astype(jnp.bfloat16)

    return Timed(
        f"{kind.name} {n} x {k} rows={rows}",
        (spec((sets, n, width), stored),),
        arrays,
        step,
        bytes=size + 2.0 * rows * (n + k),
        flops=2.0 * rows * n * k,
        target=target(kind, rows),
        facts=dict(kind=kind.name, n=n, k=k, rows=rows, sets=sets),
    )


def cases(tiny: bool) -> list[Timed]:
    if tiny:
        return [quant_case(kind, 64, 256, 2) for kind in (AWQ, FP8)]
    up, down = PRODUCTS["up"], PRODUCTS["down"]
    found = [quant_case(AWQ, *PRODUCTS[name], rows) for rows in (1, 16, 64) for name in PRODUCTS]
    found += [quant_case(kind, *up, rows) for kind in (GPTQ, FP8, INT8, FP8_GROUPS, FINE) for rows in (1, 16, 64)]
    found += [quant_case(AWQ, *up, rows) for rows in (4, 32, 128, 256)]
    return found + [quant_case(FP8, *down, rows) for rows in (1, 64)]


def run(page: Page) -> None:
    timing.run(page, cases(page.settings.tiny))
