# SPDX-License-Identifier: Apache-2.0
"""Sections `engine_decode`, `engine_prefill` and `engine_offline`: the whole engine against the device's roofline.

Llama-3.1-8B with random bfloat16 weights and the default settings for a GPU. `floor_pct` is the least possible time as
a percentage of the measured one, by this GPU's measured copy bandwidth and matmul rate; `table_pct` is the same by
4.3 TB/s and 790 TFLOP/s. `device_ms` is the same step without the host: the difference from `ms` is host time that the
device did not hide.
"""

import math
import random

from benchmarks.gpu.book import Page, Row
from benchmarks.gpu.engine import roofline
from benchmarks.gpu.engine.rig import Rig, rig_of
from benchmarks.gpu.times.timing import Aim, Ceilings

DECODE_COLUMNS = ("ms", "device_ms", "spread", "tokens_per_s", "floor_pct", "table_pct", "met", "note")
PREFILL_COLUMNS = ("ms", "spread", "tokens_per_s", "tflops", "floor_pct", "table_pct", "met")
OFFLINE_COLUMNS = ("seconds", "tokens_per_s", "total_per_s", "floor_pct", "table_pct", "complete", "met")
PEER_MIX = "64 requests of 256 and 128"
_SHAREGPT = {"prompt": (128, 1.2), "answer": (160, 0.9)}  # medians, and standard deviations of the logarithms


def judged(row: Row, target: Aim | None) -> Row:
    """The row with its target, and whether that is met."""
    timed = row | {"us": 1e3 * row["ms"]}
    return timed | {"target": None if target is None else str(target), "met": target and target.met(timed)}


# --- decode ---------------------------------------------------------------------------------------------------------


def decode_cases(tiny: bool) -> list[tuple[int, int]]:
    if tiny:
        return [(1, 16), (2, 16), (64, 4096)]
    at_1k = [(rows, 1024) for rows in (1, 64, 256, 8, 32, 128)]
    return at_1k + [(rows, 4096) for rows in (64, 1, 128, 8, 32, 256)]


def decode_target(rows: int) -> Aim | None:
    """The target for one H200."""
    if rows == 1:
        return Aim("floor_pct", 80)
    return Aim("floor_pct", 85) if rows >= 64 else None


def measure_decode(rig: Rig, rows: int, context: int, ceilings: Ceilings) -> Row:
    if not rig.fits(rows, context):
        return {"note": "no room", "blocks": rig.engine.limits.num_blocks}
    row = rig.decode(rows, context)
    moved, ms = rig.roof.step_bytes(rows, row["context"]), row["ms"]
    row |= {
        "tokens_per_s": 1e3 * rows / ms,
        "bytes": moved,
        "floor_ms": roofline.bytes_ms(moved, ceilings),
        "floor_pct": roofline.percent(roofline.bytes_ms(moved, ceilings), ms),
        "table_pct": roofline.percent(roofline.bytes_ms(moved, roofline.TABLE), ms),
    }
    return judged(row, decode_target(rows))


def run_decode(page: Page) -> None:
    rig, ceilings = rig_of(page), Ceilings.load(page)
    page.each(
        decode_cases(page.settings.tiny),
        lambda case: measure_decode(rig, *case, ceilings),
        name=lambda case: f"{case[0]} rows at {case[1]} tokens",
    )


# --- prefill --------------------------------------------------------------------------------------------------------


def measure_prefill(rig: Rig, prompt: int, together: int, ceilings: Ceilings) -> Row:
    row: Row = {}
    if together == 1:
        row |= rig.prefill(prompt)
    else:
        row["ms"] = 1e3 * rig.run([(prompt, 1)] * together, seconds=math.inf).seconds
    flops, ms = together * rig.roof.prefill_flops(prompt), row["ms"]
    row |= {"tokens_per_s": 1e3 * together * prompt / ms, "flops": flops, "tflops": flops / ms / 1e9}
    row["floor_pct"] = 100 * row["tflops"] / ceilings.matmul if ceilings.matmul else None
    row["table_pct"] = 100 * row["tflops"] / (roofline.TABLE.matmul or 1)
    return judged(row, Aim("floor_pct", 55) if prompt == 8192 else None)


def run_prefill(page: Page) -> None:
    rig, ceilings = rig_of(page), Ceilings.load(page)
    whole = [(prompt, 1) for prompt in ((40,) if page.settings.tiny else (8192, 2048, 512, 1024, 4096))]
    page.each(
        [*whole, (16, 2) if page.settings.tiny else (1024, 32)],
        lambda case: measure_prefill(rig, *case, ceilings),
        name=lambda case: f"{case[0]} tokens" if case[1] == 1 else f"{case[1]} prompts of {case[0]} together",
    )


# --- offline --------------------------------------------------------------------------------------------------------


def sharegpt(count: int, *, longest: int, seed: int = 0) -> list[tuple[int, int]]:
    """Lengths like those of real chats: log-normal, some far longer than most."""
    draws = random.Random(seed)

    def one(kind: str) -> int:
        median, spread = _SHAREGPT[kind]
        return max(2, min(longest, round(median * math.exp(draws.gauss(0, spread)))))

    return [(one("prompt"), one("answer")) for _ in range(count)]


def mixes(tiny: bool) -> dict[str, list[tuple[int, int]]]:
    if tiny:
        return {"4 requests of 10 and 6": [(10, 6)] * 4, "like ShareGPT": sharegpt(4, longest=12), PEER_MIX: [(8, 4)]}
    return {
        PEER_MIX: [(256, 128)] * 64,
        # As many as run at once, so that only a full batch is timed.
        "256 requests of 1000 and 1000": [(1000, 1000)] * 256,
        "like ShareGPT, 1024 requests": sharegpt(1024, longest=1024),
    }


def measure_offline(rig: Rig, requests: list[tuple[int, int]], seconds: float, ceilings: Ceilings) -> Row:
    done = rig.run(requests, seconds=seconds)
    rows = min(rig.buckets.rows, len(requests))
    ms = 1e3 * done.seconds
    floors = [rig.roof.offline_ms(done.answers, rows=rows, ceilings=each) for each in (ceilings, roofline.TABLE)]
    row = {
        "ms": ms,
        "steps": done.steps,
        "complete": done.complete,  # False if the section's time ran out: only generated tokens count
        "requests": len(done.answers),
        "output_tokens": done.output,
        "tokens_per_s": done.output / done.seconds,
        "total_per_s": done.total / done.seconds,
        "floor_ms": floors[0],
        "floor_pct": roofline.percent(floors[0], ms),
        "table_pct": roofline.percent(floors[1], ms),
    }
    return judged(row, Aim("floor_pct", 80) if requests[0] == (1000, 1000) else None)


def run_offline(page: Page) -> None:
    rig, ceilings = rig_of(page), Ceilings.load(page)
    rig.run([(20, 4)] * 2, seconds=60)  # warms up: something in a first run is always slow
    page.each(
        mixes(page.settings.tiny).items(),
        lambda case: measure_offline(rig, case[1], max(page.time_left(), 5), ceilings),
        name=lambda case: case[0],
    )
