# SPDX-License-Identifier: Apache-2.0
"""Section `check_quant`: products with weights of 4 and 8 bits against the oracle, with outputs prefilled with garbage.

All codes and zero points occur. Rows of padding hold NaN, which must stay in them.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu.book import Page, Row
from benchmarks.gpu.checks import poison
from benchmarks.gpu.checks.attention import TOLERANCE, compare, implementation
from benchmarks.gpu.times.quant import AWQ, FINE, FP8, FP8_GROUPS, GPTQ, INT8, Kind
from pallas_kernels import reference
from pallas_kernels.quant_matmul import quant_matmul
from pallas_kernels.tuning import QuantTiles

COLUMNS = ("rows", "rel_error", "worst", "tolerance", "written", "aliased", "ok")
HALVES = Kind("int4 in 64", "int8", 4, 64)
ROWS = Kind("uint4 by row", "uint8", 4, None, zeros=True)
E5M2 = Kind("e5m2 by row", "float8_e5m2", 8, None)
TOO_SMALL = Kind("uint4 in 16", "uint8", 4, 16, zeros=True)  # decoded
KINDS = (AWQ, GPTQ, FINE, HALVES, ROWS, INT8, FP8, FP8_GROUPS, E5M2, TOO_SMALL)


@dataclass(frozen=True)
class QuantCase:
    kind: Kind
    rows: int
    n: int = 1000
    k: int = 1024
    dtype: str = "bfloat16"
    tiles: QuantTiles | None = None

    @property
    def name(self) -> str:
        of_tiles = "" if self.tiles is None else f" tiles {self.tiles.block_rows} x {self.tiles.block_columns}"
        return f"{self.kind.name} {self.n} x {self.k} rows={self.rows} {self.dtype}{of_tiles}"


def weight_of(rng: np.random.Generator, case: QuantCase) -> tuple[np.ndarray, ...]:
    """Codes, scales, and zero points if the kind has them."""
    kind = case.kind
    codes = rng.integers(0, 256, (case.n, case.k * kind.bits // 8), np.uint8)
    if kind.codes.startswith("float8"):
        largest = {"float8_e4m3fn": 0x7E, "float8_e5m2": 0x7B}[kind.codes]
        codes = np.where((codes & 0x7F) > largest, codes & 0x80, codes).astype(np.uint8)
    groups = 1 if kind.group is None else case.k // kind.group
    scales = (rng.uniform(0.5, 2, (case.n, groups)) / 64).astype(np.float16)
    found = (codes.view(jnp.dtype(kind.codes)), scales)
    return (*found, rng.integers(0, 16, scales.shape, np.uint8)) if kind.zeros else found


def check(rng: np.random.Generator, case: QuantCase) -> Row:
    weight, dtype = weight_of(rng, case), jnp.dtype(case.dtype)
    x = rng.standard_normal((case.rows, case.k), np.float32).astype(dtype)
    padding = case.rows // 3  # the last ones
    real = case.rows - padding
    x[real:] = np.nan

    def call(arrays: tuple[jax.Array, ...]) -> Any:
        return quant_matmul(*arrays, tiles=case.tiles)

    outcome = poison.run(call, tuple(jnp.asarray(array) for array in (x, *weight)))
    out = np.asarray(outcome.first)
    row = compare(out[:real], reference.quant_matmul(x[:real], *weight), TOLERANCE[case.dtype])
    row |= {"rows": case.rows, "written": outcome.repeatable, "aliased": outcome.aliased}
    row["ok"] = bool(row["ok"] and outcome.repeatable and np.isnan(out[real:].astype(np.float32)).all())
    return row


def cases(tiny: bool) -> list[QuantCase]:
    if tiny:
        return [QuantCase(kind, 3, n=40, k=256) for kind in (AWQ, GPTQ, FP8)]
    found = [QuantCase(kind, rows) for kind in KINDS for rows in (1, 16, 32, 64)]
    found += [QuantCase(AWQ, rows) for rows in (2, 7, 8, 9, 17, 33, 65, 100, 128, 129, 300)]
    found += [QuantCase(kind, rows, dtype="float16") for kind in (AWQ, FINE, INT8, FP8) for rows in (5, 50)]
    found += [QuantCase(AWQ, 5, dtype="float32"), QuantCase(AWQ, 3, n=1, k=128), QuantCase(GPTQ, 3, n=129, k=640)]
    found += [QuantCase(kind, rows, 4096, 4096) for kind in (AWQ, FP8) for rows in (1, 16, 64)]
    tiles = (QuantTiles(16, 64, 64, 3, 4, 3), QuantTiles(32, 64, 128, 1, 2, 5), QuantTiles(64, 128, 128, 2, 8, 2))
    return found + [QuantCase(kind, 40, tiles=each) for kind in (AWQ, INT8) for each in tiles]


def run(page: Page) -> None:
    with implementation(page):
        page.each(cases(page.settings.tiny), lambda c: check(page.rng, c), name=lambda c: c.name)
