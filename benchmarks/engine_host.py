# SPDX-License-Identifier: Apache-2.0
"""Measures the host time of an engine step: `python -m benchmarks.engine_host [--json FILE] [--tiny]`.

The engine is real except for its runner, which is replaced by one that computes nothing and takes no time. What remains
of `Engine.step` is Python: scheduling, packing the plan into one vector, accepting tokens, handing on blocks, producing
updates. Every row decodes, with the prefix cache on, blocks of 16 and one step in flight.

On a shared machine step times have a long tail, so the result is the first quartile, with the median beside it. The
target is 1.0 ms at 256 rows on a server core, 1.5 ms on the cores of the development machine. Then the same steady
state is measured in an engine that has served 10,000 requests and in one that has served 10, alternating step by step:
finished requests must not slow down later steps.
"""

import argparse
import json
import random
import statistics
import time
from dataclasses import asdict, dataclass
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import facts, published
from benchmarks.arguments import file_to_write
from jaxserve.config import EngineConfig
from jaxserve.engine.engine import Engine
from jaxserve.engine.schedule.packing import StepMessage
from jaxserve.engine.schedule.plan import StepPlan, StepResult
from jaxserve.models import param_layout
from jaxserve.types.request import Request
from jaxserve.types.sampling_params import SamplingParams

BLOCK = 16
AIM_MS, AIM_ROWS = 1.5, 256
FLAT_AIM = 1.1
TOKEN = 7


class IdleRunner:
    """Returns the same token for every row and records when it was called."""

    def __init__(self) -> None:
        self.launched = self.read_at = 0.0

    def launch(self, message: StepMessage) -> StepMessage:
        self.launched = time.perf_counter()
        return message

    def read(self, handle: StepMessage) -> StepResult:
        result = StepResult([TOKEN] * handle.entries, [True] * handle.entries)
        self.read_at = time.perf_counter()
        return result


@dataclass(frozen=True)
class StepSeconds:
    """The seconds of a step and of its parts."""

    whole: float
    schedule: float
    pack: float
    commit: float


@dataclass(frozen=True)
class StepTimes:
    """Microseconds per step: first quartiles, and the median of the whole."""

    rows: int
    steps: int
    step_us: float
    median_us: float
    row_us: float
    schedule_us: float
    pack_us: float
    commit_us: float


class Bench:
    """An engine without a device, whose parts are timed."""

    def __init__(self, *, rows: int, longest: int, seed: int) -> None:
        spec = published.tiny()
        shapes = param_layout.abstract_params(spec, jnp.float32)
        params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        config = EngineConfig(
            model="none",
            max_model_len=longest,
            max_num_seqs=rows,
            max_num_batched_tokens=max(rows, 512),
            block_size=BLOCK,
            num_blocks=1 + rows * -(-longest // BLOCK),
            warmup=False,
            compilation_cache_dir="",
        )
        self.engine = Engine(config, params=params, spec=spec, report=lambda line: None)
        self.engine.runner.free()
        self.runner: Any = IdleRunner()
        self.engine.runner = self.runner
        self.draws, self.rows, self.longest = random.Random(seed), rows, longest
        self.requests = 0
        self._scheduled = 0.0
        schedule = self.engine.scheduler.schedule

        def timed(now: float = 0.0) -> StepPlan | None:
            plan = schedule(now)
            self._scheduled = time.perf_counter()
            return plan

        self.engine.scheduler.schedule = timed

    def add(self, prompt: int, answer: int) -> None:
        vocabulary = range(self.engine.limits.vocab_size)
        self.requests += 1
        params = SamplingParams(temperature=0, max_tokens=answer, ignore_eos=True)
        ids = self.draws.choices(vocabulary, k=prompt)
        self.engine.add(Request(id=f"request-{self.requests}", prompt_token_ids=ids, params=params))

    def serve(self, count: int) -> None:
        """Runs `count` short requests to completion."""
        for _ in range(count):
            self.add(self.draws.randint(2, 3 * BLOCK), self.draws.randint(1, 8))
            if self.engine.scheduler.queued > self.rows:
                self.engine.step()
        self.drain()

    def drain(self) -> None:
        while self.engine.unfinished:
            self.engine.step()

    def fill(self) -> None:
        """Steps until every row decodes, at various positions within the blocks."""
        for _ in range(self.rows):
            self.add(self.draws.randint(self.longest // 16, self.longest // 4), self.longest)
        while len(self.engine.step()) < self.rows:
            pass

    def step(self) -> StepSeconds:
        start = time.perf_counter()
        updates = self.engine.step()
        end = time.perf_counter()
        assert len(updates) == self.rows
        runner = self.runner
        return StepSeconds(
            end - start, self._scheduled - start, runner.launched - self._scheduled, end - runner.read_at
        )


def row_of(rows: int, steps: list[StepSeconds]) -> StepTimes:
    def quarter(part: str) -> float:
        return statistics.quantiles([getattr(step, part) * 1e6 for step in steps], n=4)[0]

    whole = quarter("whole")
    return StepTimes(
        rows=rows,
        steps=len(steps),
        step_us=whole,
        median_us=statistics.median(step.whole for step in steps) * 1e6,
        row_us=whole / rows,
        schedule_us=quarter("schedule"),
        pack_us=quarter("pack"),
        commit_us=quarter("commit"),
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.engine_host", description="Measure the host's time per step."
    )
    parser.add_argument("--json", type=file_to_write, metavar="FILE", help="also write the rows to FILE")
    parser.add_argument("--tiny", action="store_true", help="toy sizes, to check that it runs")
    parser.add_argument("--seed", type=int, default=0, help="seed of the requests (default: 0)")
    options = parser.parse_args(arguments)
    jax.config.update("jax_platforms", "cpu")
    sizes, steps, longest, served = (
        ([1, 4], 20, 256, (2, 50)) if options.tiny else ([1, 64, 256], 600, 2048, (10, 10_000))
    )
    print(f"{'rows':>5} {'step us':>8} {'median':>8} {'us/row':>7} {'schedule':>9} {'pack':>7} {'commit':>7}")
    rows: list[StepTimes] = []
    for size in sizes:
        bench = Bench(rows=size, longest=longest, seed=options.seed)
        bench.fill()
        row = row_of(size, [bench.step() for _ in range(steps)])
        rows.append(row)
        print(
            f"{row.rows:5} {row.step_us:8.1f} {row.median_us:8.1f} {row.row_us:7.2f} {row.schedule_us:9.1f} "
            f"{row.pack_us:7.1f} {row.commit_us:7.1f}",
            flush=True,
        )
    if rows[-1].rows == AIM_ROWS:
        print(f"{rows[-1].step_us / 1000:.2f} ms at {AIM_ROWS} rows, target at most {AIM_MS}")
    young, old = (Bench(rows=sizes[-1], longest=longest, seed=options.seed) for _ in range(2))
    for bench, count in zip((young, old), served, strict=True):
        bench.serve(count)
        bench.fill()
    pairs = [(young.step(), old.step()) for _ in range(steps)]
    after = [row_of(sizes[-1], list(column)) for column in zip(*pairs, strict=True)]
    ratio = after[1].step_us / after[0].step_us
    print(
        f"after {served[0]:,} requests {after[0].step_us:.1f} us, after {served[1]:,} {after[1].step_us:.1f} us: "
        f"ratio {ratio:.3f}, target at most {FLAT_AIM}"
    )
    if options.json:
        content = facts.collect() | {"processor": facts.processor(), "served": served, "ratio": ratio}
        shown = [asdict(row) for row in rows], [asdict(row) for row in after]
        options.json.write_text(json.dumps(content | {"rows": shown[0], "after": shown[1]}, indent=1) + "\n")


if __name__ == "__main__":
    main()
