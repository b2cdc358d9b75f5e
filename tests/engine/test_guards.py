# SPDX-License-Identifier: Apache-2.0
"""What a warm engine never does, with work that uses every feature: compile, send too much, allocate, copy."""

import gc
import re
from typing import Any

import jax
import pytest

from jaxserve.engine.execute import compiler
from jaxserve.engine.schedule.need import Variant
from jaxserve.engine.schedule.packing import Layout, StepMessage
from jaxserve.types.request import Request
from jaxserve.types.sampling_params import SamplingParams
from tests.conftest import ForbidCompiles
from tests.engine.driver import BLOCK, BLOCKS, LONGEST, Driver, Known
from tests.engine.workloads import Job, random_jobs, run

SEEDS = range(4)


class Watched(Driver):
    """Records each step's input, the number of vectors sent, and the addresses of the state after it."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.sent: list[tuple[StepMessage, int]] = []
        self.needs: set[Any] = set()
        self.moved: list[str] = []
        self.arrays: list[int] = []
        self.puts = 0
        put, launch = self.runner._put, self.runner.launch  # pyright: ignore[reportPrivateUsage]

        def counted(arrays: Any) -> Any:
            self.puts += 1
            return put(arrays)

        def watched(message: StepMessage) -> Any:
            before, lay = self.puts, pointers(self.runner)
            handle = launch(message)
            self.sent.append((message, self.puts - before))
            if message.entries > message.embeds:
                self.needs.add(message.head)
            self.moved += [name for name, at in pointers(self.runner).items() if at != lay[name]]
            return handle

        self.runner._put, self.runner.launch = counted, watched  # pyright: ignore[reportPrivateUsage]

    def check(self) -> None:
        super().check()
        if not self.engine._in_flight:  # pyright: ignore[reportPrivateUsage]
            self.arrays.append(len(jax.live_arrays()))


def pointers(runner: Any) -> dict[str, int]:
    state = dict(cache=runner.cache, tables=runner.tables, last=runner.last, controls=runner.controls)
    leaves, _ = jax.tree.flatten_with_path(state)
    return {jax.tree_util.keystr(path): leaf.unsafe_buffer_pointer() for path, leaf in leaves}


@pytest.fixture(scope="module")
def warm() -> Watched:
    return Watched(warmup=True, spare=LONGEST // BLOCK + 2, budget=16)


def work(seed: int) -> list[Job]:
    """Every kind of row, and some that certainly use a feature."""
    jobs = random_jobs(100 + seed, count=10)
    plain: dict[str, Any] = dict(prompt_token_ids=list(range(1 + seed, 20 + seed)))
    asked = (
        Request(id="greedy", params=SamplingParams(temperature=0, max_tokens=30), **plain),
        Request(id="samples", params=SamplingParams(n=3, seed=seed, max_tokens=20), **plain),
        Request(id="scored", params=SamplingParams(prompt_logprobs=2, logprobs=0, top_k=5, seed=1), **plain),
        Request(id="whole", params=SamplingParams(prompt_logprobs=0), score_only=True, **plain),
        Request(id="embedded", embed=True, **plain),
        Request(id="ended", params=SamplingParams(seed=seed, max_tokens=None, repetition_penalty=1.2), **plain),
    )
    return [*(Job(request, 0, 5 if request.id == "ended" else None, None) for request in asked), *jobs]


def test_a_warm_engine(warm: Watched, forbid_compiles: ForbidCompiles) -> None:
    gc.collect()  # what other tests have left in cycles
    baseline = len(jax.live_arrays())
    with forbid_compiles(), jax.no_tracing(), jax.transfer_guard("disallow"):
        found = [run(warm, work(seed)) for seed in SEEDS]
        warm.drafts = Known(found[0], rate=0.9)
        run(warm, work(0))
    metrics = warm.engine.metrics()
    assert metrics.compiled_late == 0

    # It was work that had it all.
    assert warm.needs == set(warm.runner.heads)
    assert metrics.preemptions and metrics.cached_tokens and warm.copied
    assert all(metrics.finished[reason] for reason in ("stop", "length", "abort"))
    layouts = {message.layout for message, _ in warm.sent}
    assert layouts == {key for key in warm.runner.every_key() if isinstance(key, Layout)}

    for message, puts in warm.sent:
        assert puts == 1
        assert len(message.controls) <= 1 and len(message.counts) <= 1, "arrivals of a step are sent together"
    plain = [message for message, _ in warm.sent if not (message.edits or message.controls or message.counts)]
    assert len(plain) > len(warm.sent) // 2

    assert not warm.moved, f"donated, and yet not in place: {sorted(set(warm.moved))}"
    assert set(warm.arrays) == {baseline}, "arrays that stay"


def test_programs_write_in_place(warm: Watched) -> None:
    """XLA aliases the whole state and copies no pool."""
    runner = warm.runner
    sizes = {name: sum(leaf.nbytes for leaf in jax.tree.leaves(state)) for name, state in state_of(runner).items()}
    pool = next(iter(runner.cache[0].values()))
    shape = ",".join(map(str, pool.shape))
    assert pool.shape[0] == BLOCKS
    for key in runner.every_key():
        with runner.on_mesh():
            compiled = compiler.compiled(runner.program(key))
        memory, text = compiled.memory_analysis(), compiled.as_text()
        assert memory.alias_size_in_bytes >= sum(sizes[name] for name in donated(key)), key
        if isinstance(key, Layout) or key == "edit":
            assert f"f32[{shape}]" in text
            assert not re.search(rf"= f32\[{shape}\]\S* (copy|convert)\(", text), key


def state_of(runner: Any) -> dict[str, Any]:
    return dict(cache=runner.cache, tables=runner.tables, last=runner.last, controls=runner.controls)


def donated(key: Any) -> tuple[str, ...]:
    match key:
        case Layout() | "edit":
            return ("cache", "tables")
        case ("embed", _):
            return ()
        case (_, Variant() as head):
            return ("last", "controls") if head.controlled else ("last",)
        case _:
            return ("controls",)
