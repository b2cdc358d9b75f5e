# SPDX-License-Identifier: Apache-2.0
"""Section `sweep`: finds the fastest tiles on this GPU, for `pallas_kernels/tuning.json`.

The key that an op looks up, and its default tiles, are recorded while the op is traced, so every entry is one that the
op finds. Each shape takes two rounds: first the knobs that divide the work, then, for the best of those, how each
program runs. The best tiles are adopted only if they give the same results as the default and beat it, in alternating
runs, by more than the noise.
"""

import dataclasses
import itertools
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
import numpy as np

from benchmarks import models
from benchmarks.gpu.book import Page, Row, describe, write_json
from benchmarks.gpu.checks.attention import implementation
from benchmarks.gpu.times import timing
from benchmarks.gpu.times.attention import decode_case, mla_case, ragged_case
from benchmarks.gpu.times.matmul import QWEN3_30B, grouped_case
from benchmarks.gpu.times.quant import AWQ, FP8, PRODUCTS, Kind, quant_case
from benchmarks.gpu.times.sampling import sampling_case
from benchmarks.gpu.times.timing import Arrays, Timed
from pallas_kernels import dispatch, tuning
from pallas_kernels.tuning import Tiles

COLUMNS = ("default_us", "best_us", "gain_pct", "noise_pct", "tried", "unfit", "adopted")

_LEAST_GAIN = 0.01  # a smaller gain is not worth an entry

type Knobs = dict[str, tuple[int, ...]]


class Tuned(NamedTuple):
    op: str  # its name in the table
    case: Callable[[Tiles | None], Timed]
    rounds: tuple[Knobs, ...]


DECODE = (
    {"block_kv": (32, 64, 128), "splits": (1, 2, 3, 4, 6, 8, 16, 32)},
    {"num_warps": (2, 4, 8), "num_stages": (2, 3, 4)},
)
RAGGED = ({"block_rows": (64, 128), "block_kv": (32, 64, 128), "num_warps": (4, 8), "num_stages": (2, 3)},)
MLA_DECODE = (
    {"block_kv": (16, 32, 64), "splits": (1, 2, 4, 8, 16, 32)},
    {"num_warps": (4, 8), "num_stages": (1, 2, 3)},
)
MLA_RAGGED = ({"block_rows": (32, 64, 128), "block_kv": (16, 32, 64), "num_warps": (4, 8), "num_stages": (1, 2)},)
GROUPED = (
    {"block_rows": (16, 32, 64, 128), "block_columns": (32, 64, 128, 256), "block_inner": (64, 128)},
    {"num_warps": (4, 8), "num_stages": (2, 3, 4, 5)},
)
QUANT = (
    {"block_columns": (64, 128, 256), "block_inner": (64, 128), "splits": (1, 2, 4, 8, 16)},
    {"num_warps": (2, 4, 8), "num_stages": (3, 4, 5)},
)
SAMPLING = ({"block": (1024, 2048, 4096, 8192), "num_warps": (4, 8, 16, 32)}, {"pivots": (4, 8, 16)})


def shapes(tiny: bool) -> list[Tuned]:
    """The most important shapes first: a sweep may run out of time."""
    if tiny:
        few = ({"splits": (1, 2)}, {"num_warps": (2, 4)})
        return [
            Tuned("paged_decode", lambda t: decode_case(models.TINY, 2, 24, tiles=t), few),
            Tuned("sampling", lambda t: sampling_case(2, "both", vocabulary=300, tiles=t), ({"pivots": (4, 8)},)),
        ]

    def decode(model: models.Heads, rows: int, kv: str = "bfloat16") -> Tuned:
        tokens = 64 * 8192  # one pool for all row counts of a model
        context = min(4096, tokens // rows)
        return Tuned(
            "paged_decode",
            lambda tiles: decode_case(model, rows, context, kv=kv, pool_tokens=tokens, tiles=tiles),
            DECODE,
        )

    def ragged(model: models.Heads, kv: str = "bfloat16") -> Tuned:
        return Tuned("paged_ragged", lambda tiles: ragged_case(model, 4096, kv=kv, tiles=tiles), RAGGED)

    def mla(rows: int, context: int) -> Tuned:
        return Tuned("mla_decode", lambda tiles: mla_case(rows, context, tiles=tiles), MLA_DECODE)

    def sampling(asked: str, rows: int = 256, dtype: str = "float32") -> Tuned:
        return Tuned("sampling", lambda tiles: sampling_case(rows, asked, dtype=dtype, tiles=tiles), SAMPLING)

    def grouped(tokens: int, product: str) -> Tuned:
        return Tuned("grouped_matmul", lambda tiles: grouped_case(QWEN3_30B, tokens, product, tiles=tiles), GROUPED)

    def quant(kind: Kind, product: str, rows: int) -> Tuned:
        n, k = PRODUCTS[product]
        return Tuned("quant_matmul", lambda tiles: quant_case(kind, n, k, rows, tiles=tiles), QUANT)

    llama, eight_bit = models.LLAMA_8B, "float8_e4m3fn"
    return [
        *(decode(llama, rows) for rows in (64, 8, 1, 32, 128, 256, 16, 4, 2)),
        ragged(llama),
        sampling("both"),
        sampling("greedy"),
        sampling("random"),
        *(sampling("both", rows) for rows in (1, 8, 64)),
        *(grouped(tokens, product) for product in QWEN3_30B.products for tokens in (64, 4096)),
        *(quant(AWQ, product, rows) for rows in (1, 16, 64) for product in ("up", "down")),
        mla(64, 4096),
        *(decode(llama, rows, eight_bit) for rows in (64, 8, 256)),
        *(decode(models.QWEN3_30B, rows) for rows in (64, 8)),
        *(ragged(model) for model in (models.QWEN3_235B, models.GEMMA_9B)),
        mla(8, 4096),
        *(decode(model, rows) for model in (models.GEMMA_9B, models.QWEN3_235B) for rows in (64, 8)),
        Tuned("mla_ragged", lambda tiles: mla_case(1, 2048, tokens=2048, tiles=tiles), MLA_RAGGED),
        *(quant(FP8, "up", rows) for rows in (1, 64)),
        mla(256, 1024),
        sampling("both", dtype="bfloat16"),
        *(decode(models.QWEN3_0_6B, rows) for rows in (64, 8)),
        ragged(llama, eight_bit),
        ragged(models.QWEN3_0_6B),
    ]


def looked_up(tuned: Tuned, page: Page) -> tuple[str, Tiles]:
    """The key under which the op looks up its tiles, and the tiles that it uses if there is no entry."""
    asked: dict[str, tuple[str, Tiles]] = {}

    def choose(op: str, key: str, default: Tiles) -> Tiles:
        asked[op] = key, default
        return default

    case = tuned.case(None)
    with mock.patch.object(tuning, "choose", choose), implementation(page):  # the CPU implementation looks up no tiles
        case.chain(1).trace(*case.abstract())
    return asked[tuned.op]


def variants(start: Tiles, knobs: Knobs) -> list[Tiles]:
    """Every combination of the knobs, the rest as in `start`."""
    combinations = itertools.product(*knobs.values())
    return [dataclasses.replace(start, **dict(zip(knobs, values, strict=True))) for values in combinations]


class Trial(NamedTuple):
    tiles: Tiles
    program: Any = None
    us: float = float("inf")  # per call, with a share of the fixed costs: comparable only for equal numbers of calls
    error: str | None = None

    def as_row(self) -> Row:
        found = {"error": self.error} if self.error else {"us": self.us}
        return dataclasses.asdict(self.tiles) | found


def _seconds(program: Any, arrays: Arrays, times: int) -> list[float]:
    return [timing.run_once(program, arrays)[0] for _ in range(times)]


def attempt(tuned: Tuned, tiles: Sequence[Tiles], arrays: Arrays, calls: int) -> list[Trial]:
    """Compiles in parallel, runs one by one. An error, such as tiles that do not fit the chip, is a result."""
    programs = timing.in_threads(lambda t: tuned.case(t).compile(calls), tiles)
    trials = []
    for t, program in zip(tiles, programs, strict=True):
        if isinstance(program, Exception):
            trials.append(Trial(t, error=describe(program)))
            continue
        try:
            _seconds(program, arrays, 2)
            us = 1e6 * float(np.median(_seconds(program, arrays, 5))) / calls
            trials.append(Trial(t, program, us))
        except Exception as error:
            trials.append(Trial(t, error=describe(error)))
    return trials


def agree(a: Any, b: Any) -> bool:
    """Whether two results agree: integers exactly, floats within what another order of summation explains."""
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        x, y = np.asarray(x), np.asarray(y)
        if np.issubdtype(x.dtype, np.integer):
            if not (x == y).all():
                return False
            continue
        x, y = x.astype(np.float64), y.astype(np.float64)
        if not np.linalg.norm(x - y) <= 2e-2 * np.linalg.norm(y):  # also true if either is NaN
            return False
    return True


class Final(NamedTuple):
    default_us: float
    best_us: float
    noise: float  # the larger of the two interquartile ranges, relative
    same: bool

    @property
    def gain(self) -> float:
        return 1 - self.best_us / self.default_us

    @property
    def won(self) -> bool:
        return self.same and self.gain > max(self.noise, _LEAST_GAIN)


def final(default: Trial, best: Trial, arrays: Arrays, calls: int, repeats: int = 15) -> Final:
    """Times the best tiles and the default alternately."""
    programs = (default.program, best.program)
    times = np.array([[_seconds(program, arrays, 1)[0] for program in programs] for _ in range(repeats)])
    low, middle, high = np.quantile(times * 1e6 / calls, (0.25, 0.5, 0.75), axis=0)
    same = agree(best.program(*arrays), default.program(*arrays))
    return Final(float(middle[0]), float(middle[1]), float(((high - low) / middle).max()), same)


def search(page: Page, tuned: Tuned, pools: timing.Pools) -> Row:
    key, default = looked_up(tuned, page)
    case = tuned.case(None)
    calls = timing.calls_for(max(2.0 * case.bytes / 4e6, 2.0 * case.flops / 7e8, 5.0), tiny=page.settings.tiny)[1]
    arrays = case.on_device(pools.get(case.pool))
    trials = attempt(tuned, [default], arrays, calls)
    first = best = trials[0]
    if first.error:
        raise RuntimeError(f"the default tiles fail: {first.error}")
    for knobs in tuned.rounds:
        seen = {trial.tiles for trial in trials}
        trials += attempt(tuned, [t for t in variants(best.tiles, knobs) if t not in seen], arrays, calls)
        best = min(trials, key=lambda trial: trial.us)
    row: Row = {
        "op": tuned.op,
        "key": key,
        "default": dataclasses.asdict(default),
        "best": dataclasses.asdict(best.tiles),
        "tried": len(trials),
        "unfit": sum(trial.error is not None for trial in trials),
        "variants": [trial.as_row() for trial in sorted(trials, key=lambda trial: trial.us)],
    }
    result = Final(first.us, best.us, 0.0, True) if best is first else final(first, best, arrays, calls)
    row |= {"default_us": result.default_us, "best_us": result.best_us, "same_results": result.same}
    row |= {"gain_pct": 100 * result.gain, "noise_pct": 100 * result.noise, "adopted": result.won}
    keep(page, tuned.op, key, dataclasses.asdict(best.tiles) if result.won else None)
    return row


def keep(page: Page, op: str, key: str, tiles: dict[str, int] | None) -> None:
    """Writes the entry to the results and to the table that the ops read; None removes it: the default is best."""
    kind = dispatch.device_kind()
    for path in (page.settings.out / "tuning.json", page.settings.table):
        if path is not None:
            merge(path, kind, op, key, tiles)


def merge(path: Path, kind: str, op: str, key: str, tiles: dict[str, int] | None) -> None:
    """Sets or removes one entry of a tile table; all others stay."""
    table = json.loads(path.read_text()) if path.exists() else {}
    entries = table.setdefault(kind, {}).setdefault(op, {})
    entries.pop(key, None)
    if tiles is not None:
        entries[key] = tiles
    write_json(path, _sorted({k: {o: e for o, e in ops.items() if e} for k, ops in table.items()}))


def _sorted(table: Any) -> Any:
    if not isinstance(table, dict):
        return table
    return {k: _sorted(v) for k, v in sorted(table.items()) if v != {}}


def names(tuned: Iterable[Tuned]) -> list[str]:
    return [f"{one.op}: {one.case(None).name}" for one in tuned]


def run(page: Page) -> None:
    pools = timing.Pools()
    cases = shapes(page.settings.tiny)
    try:
        page.each(
            zip(names(cases), cases, strict=True),
            lambda case: search(page, case[1], pools),
            name=lambda case: case[0],
        )
    finally:
        pools.drop()
