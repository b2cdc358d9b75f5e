# SPDX-License-Identifier: Apache-2.0
"""Section `check_grouped`: the grouped matmul against the oracle, with outputs prefilled with garbage.

Rows outside all groups hold NaN. Of large products, one of every 16 columns is compared, drawn at random for each case:
no tile is narrower.
"""

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu.book import Page, Row
from benchmarks.gpu.checks import poison
from benchmarks.gpu.checks.attention import TOLERANCE, compare, implementation
from benchmarks.gpu.times.matmul import DEEPSEEK, GPT_OSS, MIXTRAL, QWEN3_30B, ExpertSizes, routed
from pallas_kernels import reference
from pallas_kernels.grouped_matmul import grouped_matmul
from pallas_kernels.reference import Array
from pallas_kernels.tuning import MatmulTiles

COLUMNS = ("rows", "rel_error", "worst", "tolerance", "written", "aliased", "ok")


@dataclass(frozen=True)
class MatmulCase:
    name: str
    groups: int
    n: int
    k: int
    offsets: tuple[int, ...]
    rows: int
    dtype: str = "bfloat16"
    gradients: bool = False
    options: dict[str, Any] = field(default_factory=dict)


@jax.jit
def _at(stacked: jax.Array, index: jax.Array) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(stacked, index, keepdims=False)


def _columns(rng: np.random.Generator, width: int) -> Array:
    if width <= 512:
        return np.arange(width)
    first = np.arange(0, width, 16)
    return np.minimum(first + rng.integers(0, 16, len(first)), width - 1)


def _weights(rng: np.random.Generator, case: MatmulCase) -> jax.Array:
    """Created on the device: some would take seconds to copy."""
    key = jax.random.key(int(rng.integers(2**31)))
    shape = (case.groups, case.n, case.k)
    return jax.jit(lambda: jax.random.normal(key, shape, jnp.dtype(case.dtype)))()


def check(rng: np.random.Generator, case: MatmulCase) -> Row:
    dtype, begin, end = jnp.dtype(case.dtype), case.offsets[0], case.offsets[-1]
    lhs, weight = (rng.standard_normal((case.rows, side), np.float32).astype(dtype) for side in (case.k, case.n))
    for array in (lhs, weight):
        array[:begin] = array[end:] = np.nan
    rhs, offsets = _weights(rng, case), np.array(case.offsets, np.int32)

    def call(arrays: dict[str, jax.Array]) -> Any:
        out, back = jax.vjp(
            lambda x, w: grouped_matmul(x, w, arrays["offsets"], **case.options), arrays["lhs"], arrays["rhs"]
        )
        return (out, *back(arrays["weight"].astype(out.dtype))) if case.gradients else (out,)

    given = {"lhs": jnp.asarray(lhs), "rhs": rhs, "offsets": jnp.asarray(offsets), "weight": jnp.asarray(weight)}
    outcome = poison.run(call, given)
    columns = _columns(rng, case.n)  # all columns if gradients are checked
    matrices = np.zeros((case.groups, len(columns), case.k), dtype)
    for group in np.flatnonzero(np.diff(offsets)):
        matrices[group] = np.asarray(_at(rhs, jnp.int32(group)))[columns]
    expected = [reference.grouped_matmul(lhs, matrices, offsets)]
    found = [outcome.first[0][:, columns]]
    if case.gradients:
        d_lhs, d_rhs = reference.grouped_matmul_gradients(lhs, matrices, offsets, weight)
        expected += [d_lhs, d_rhs.reshape(-1, case.k)]
        found += [outcome.first[1], outcome.first[2].reshape(-1, case.k)]
    rows = [compare(f, e, TOLERANCE[case.dtype]) for f, e in zip(found, expected, strict=True)]
    worst = {name: max(row[name] for row in rows) for name in ("rel_error", "worst")}
    right = outcome.repeatable and all(row["ok"] for row in rows)
    row: Row = {"rows": case.rows, "groups": case.groups, "n": case.n, "k": case.k, "owned": end - begin}
    row |= worst | {"tolerance": TOLERANCE[case.dtype], "written": outcome.repeatable, "aliased": outcome.aliased}
    return row | {"ok": right}


def spread(rng: np.random.Generator, *, groups: int, rows: int, before: int = 0, behind: int = 0) -> tuple[int, ...]:
    """Offsets of rows that choose their group uniformly, with `before` and `behind` rows outside all groups."""
    counts = np.bincount(rng.integers(0, groups, rows - before - behind), minlength=groups)
    return tuple(int(x) for x in before + np.concatenate([[0], np.cumsum(counts)]))


def model_cases(rng: np.random.Generator, model: ExpertSizes, tokens: tuple[int, ...]) -> list[MatmulCase]:
    cases = []
    for count in tokens:
        offsets = tuple(int(x) for x in routed(rng, model, count))
        for name, (n, k) in model.products.items():
            cases.append(
                MatmulCase(f"{model.name} {name} {count} tokens", model.groups, n, k, offsets, count * model.used)
            )
    return cases


def cases(rng: np.random.Generator, tiny: bool) -> list[MatmulCase]:
    if tiny:
        small = spread(rng, groups=4, rows=30, before=3, behind=5)
        return [
            MatmulCase("bfloat16", 4, 40, 24, small, 30),
            MatmulCase("float32 with gradients", 4, 24, 40, small, 30, dtype="float32", gradients=True),
        ]
    part = spread(rng, groups=16, rows=700, before=150, behind=90)
    found = [MatmulCase(f"gradients {d}", 16, 384, 256, part, 700, dtype=d, gradients=True) for d in TOLERANCE]
    sides = ((1, 1), (33, 77), (100, 2880), (320, 200), (129, 4097))
    found += [MatmulCase(f"{n} x {k}", 16, n, k, part, 700) for n, k in sides]
    found += [MatmulCase(f"100 x 2880 {d}", 16, 100, 2880, part, 700, dtype=d) for d in ("float32", "float16")]
    found += [
        MatmulCase("gradients, odd sizes", 16, 129, 77, part, 700, gradients=True),
        MatmulCase("all rows in one group", 64, 512, 512, (0,) * 40 + (2000,) * 25, 2000),
        MatmulCase("only rows outside all groups", 8, 512, 512, (600,) * 9, 1000),
        MatmulCase("one row per group", 300, 256, 512, tuple(range(301)), 300),
        MatmulCase("float32 out of bfloat16", 16, 384, 256, part, 700, options={"out_dtype": jnp.float32}),
        # More than 2^31 elements; the groups at the end lie beyond 4 GiB.
        MatmulCase("far weights", 520, 2048, 2048, (0,) * 510 + (7, 7, 9, 11, 30, 31, 40, 40, 50, 60, 64), 64),
    ]
    found += [
        MatmulCase(f"tiles {t.block_rows} x {t.block_columns}", 16, 384, 256, part, 700, options={"tiles": t})
        for t in (MatmulTiles(16, 32, 128, 4, 4), MatmulTiles(64, 128, 64, 4, 4), MatmulTiles(128, 256, 64, 8, 3))
    ]
    for model, tokens in ((QWEN3_30B, (1, 64, 4096)), (DEEPSEEK, (64, 2048)), (MIXTRAL, (64,)), (GPT_OSS, (64, 2048))):
        found += model_cases(rng, model, tokens)
    return found


def run(page: Page) -> None:
    with implementation(page):
        page.each(cases(page.rng, page.settings.tiny), lambda c: check(page.rng, c), name=lambda c: c.name)
