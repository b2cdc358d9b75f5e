# SPDX-License-Identifier: Apache-2.0
"""The engine that the `engine` sections measure: the product's Engine, with random weights.

    rig = rig_of(page)       one per process: weights are created on the device, programs compiled once
    rig.fill(rows, context)  rows that decode at a context length, without computing their prompts
    rig.decode(...)          ms of steady decode steps        rig.prefill(...)     ms to the first token

To fill rows, a stand-in for the runner answers at once, so the scheduler assigns rows and blocks as always; then the
block tables are set on the device. The KV pools hold random numbers. So a long context needs no prefill, and the steps
that are timed after it are real. All requests are greedy, and only the programs that they need are compiled.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import published
from benchmarks.gpu.book import Page, Row
from benchmarks.gpu.engine.roofline import Roofline
from jaxserve.config import EngineConfig
from jaxserve.engine.capacity import token_bytes
from jaxserve.engine.engine import Engine
from jaxserve.engine.schedule import packing
from jaxserve.engine.schedule.packing import Layout, StepMessage
from jaxserve.engine.schedule.plan import StepResult
from jaxserve.models import param_layout
from jaxserve.models.spec import Attention, Mlp, ModelSpec, Rope
from jaxserve.types.request import Request
from jaxserve.types.sampling_params import SamplingParams

SLACK = 5 * 2**30  # bytes of device memory beside weights and KV: state, temporaries, code
TOKEN = 7
BLOCK_SIZE = 16
TINY = {"max_num_seqs": 2, "max_num_batched_tokens": 32, "max_model_len": 128, "block_size": 8, "num_blocks": 40}


def _noise(shape: tuple[int, ...], seed: Any) -> jax.Array:
    """Pseudorandom numbers between -1 and 1."""
    count = jnp.broadcast_to(jnp.asarray(seed, jnp.uint32) * jnp.uint32(0x9E3779B9), shape)
    for axis, size in enumerate(shape):
        count = count * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
    mixed = (count ^ (count >> 15)) * jnp.uint32(2654435761)
    mixed = (mixed ^ (mixed >> 13)) * jnp.uint32(2246822519)
    return (mixed >> 16).astype(jnp.float32) / 32768 - 1


@partial(jax.jit, static_argnums=(0, 1))
def _weight(shape: tuple[int, ...], dtype: Any, seed: Any) -> jax.Array:
    return (0.03 * _noise(shape, seed)).astype(dtype)


@partial(jax.jit, donate_argnums=0)
def _filled(pool: jax.Array) -> jax.Array:
    """Fills the pool with noise, in place."""
    return _noise(pool.shape, 1).astype(pool.dtype)


def model(tiny: bool, layers: int | None = None) -> ModelSpec:
    spec = published.llama_8b()
    if tiny:
        layer = spec.layers[0]
        assert isinstance(layer.attention, Attention) and isinstance(layer.mlp, Mlp)
        attention = replace(layer.attention, heads=4, kv_heads=2, head_dim=16, rope=Rope(dim=16, base=1e4))
        toy = replace(layer, attention=attention, mlp=replace(layer.mlp, width=48))
        spec = replace(spec, vocab_size=96, hidden=32, layers=(toy,))
    return spec if layers is None else replace(spec, layers=spec.layers[:layers])


def random_params(spec: ModelSpec) -> Any:
    """Created leaf by leaf on the device, never on the host. Leaves of equal shape share a program."""
    leaves, tree = jax.tree.flatten(param_layout.abstract_params(spec, jnp.bfloat16))
    made = [_weight(leaf.shape, leaf.dtype, np.uint32(seed)) for seed, leaf in enumerate(leaves)]
    return jax.block_until_ready(jax.tree.unflatten(tree, made))


def settings(spec: ModelSpec, params: Any, *, tiny: bool) -> dict[str, Any]:
    """The default settings for a GPU. The number of blocks is computed here: to determine it, the engine would compile
    its largest programs twice."""
    if tiny:
        return TINY | {"compilation_cache_dir": ""}
    [device] = jax.tree.leaves(params)[0].devices()
    stats = device.memory_stats() or {}
    left = stats["bytes_limit"] - stats["bytes_in_use"] - SLACK
    return {"block_size": BLOCK_SIZE, "num_blocks": left // (BLOCK_SIZE * token_bytes(spec, "bfloat16"))}


class _Filling:
    """Replaces the runner: returns the same token for every row and records the changes of the block tables."""

    def __init__(self) -> None:
        self.edits: dict[int, int] = {}

    def launch(self, message: StepMessage) -> StepMessage:
        parts = {name: message.vector[at] for name, at in packing.places(message.layout).items()}
        once = [vector[: 2 * packing.EDITS_AT_ONCE].reshape(2, -1) for vector in message.edits]
        for cells, blocks in [*once, (parts["cells"], parts["blocks"])]:
            self.edits |= {int(c): int(b) for c, b in zip(cells, blocks, strict=True) if c >= 0}
        return message

    def read(self, handle: StepMessage) -> StepResult:
        return StepResult([TOKEN] * handle.entries, [True] * handle.entries)


@dataclass
class Done:
    """The result of a run of requests."""

    seconds: float
    steps: int
    answers: list[tuple[int, int]]  # prompt and answer tokens of the requests with an answer
    complete: bool

    @property
    def output(self) -> int:
        return sum(answer for _, answer in self.answers)

    @property
    def total(self) -> int:
        return sum(prompt + answer for prompt, answer in self.answers)


class Rig:
    def __init__(self, *, tiny: bool, layers: int | None = None, only: tuple[int, ...] | None = None) -> None:
        """`only`: the sizes for which programs are compiled; None: all buckets."""
        began = time.monotonic()
        self.spec, self.tiny = model(tiny, layers), tiny
        params = random_params(self.spec)
        weights = time.monotonic()
        config = EngineConfig(model="random", warmup=False, **settings(self.spec, params, tiny=tiny))
        self.engine = Engine(config, params=params, spec=self.spec, report=lambda line: None)
        self.runner: Any = self.engine.runner
        self.buckets = self.runner.buckets
        self.roof = Roofline(self.spec, params)
        self.runner.cache = [{name: _filled(pool) for name, pool in layer.items()} for layer in self.runner.cache]
        keys = self.keys(only)
        self.runner.every_key = lambda: keys
        self.runner.warm()
        self.seconds = {"weights": weights - began, "compile": time.monotonic() - weights}
        self.programs = len(keys)
        self._rng, self._count = np.random.default_rng(11), 0

    def keys(self, only: tuple[int, ...] | None) -> list[Any]:
        """The programs for greedy steps of these sizes."""

        def wanted(sizes: Sequence[int]) -> list[int]:
            return [size for size in reversed(sizes) if only is None or size in only]

        buckets, runner = self.buckets, self.runner
        steps = [*map(runner.mixed_layout, wanted(buckets.mixed)), *map(runner.decode_layout, wanted(buckets.decode))]
        return [*steps, *((size, runner.heads[0]) for size in wanted(buckets.heads)), "edit"]

    # --- requests ---------------------------------------------------------------------------------------------------

    def add(self, prompt: int, answer: int) -> str:
        """Adds a request of random tokens, which shares no prefix with any other."""
        self._count += 1
        ids = self._rng.integers(3, self.spec.vocab_size, prompt).tolist()
        params = SamplingParams(temperature=0, max_tokens=answer, ignore_eos=True)
        name = f"request-{self._count}"
        self.engine.add(Request(id=name, prompt_token_ids=ids, params=params))
        return name

    def clear(self) -> None:
        for name in list(self.engine.scheduler.requests):
            self.engine.abort(name)
        while self.engine.unfinished:
            self.engine.step()

    def fits(self, rows: int, context: int) -> bool:
        """Whether the KV cache holds these rows, with room for the steps that are timed."""
        needed = rows * self.engine.limits.blocks_for(context + 256 if not self.tiny else context)
        return rows <= self.buckets.rows and needed < self.engine.limits.num_blocks

    def fill(self, rows: int, context: int) -> None:
        engine, filling = self.engine, _Filling()
        longest = engine.limits.max_model_len - context
        for _ in range(rows):
            self.add(context, longest)
        engine.runner = filling  # pyright: ignore[reportAttributeAccessIssue]
        try:
            while len(engine.step()) < rows:
                pass
            engine.drain()
        finally:
            engine.runner = self.runner
        cells, blocks = (np.fromiter(part, np.int32) for part in (filling.edits.keys(), filling.edits.values()))
        edits = [
            packing.edit_vector(cells[at : at + packing.EDITS_AT_ONCE], blocks[at : at + packing.EDITS_AT_ONCE], [])
            for at in range(0, len(cells), packing.EDITS_AT_ONCE)
        ]
        smallest = next(key for key in reversed(self.runner.every_key()) if isinstance(key, Layout))
        nothing = StepMessage(
            smallest, 0, 0, self.runner.heads[0], 0, 0, packing.padding(smallest, self.buckets), edits
        )
        self.runner.read(self.runner.launch(nothing))

    def context(self) -> float:
        """The mean length of the running sequences."""
        return float(np.mean([len(sequence.tokens) for sequence in self.engine.scheduler.running]))

    # --- measuring --------------------------------------------------------------------------------------------------

    def decode(self, rows: int, context: int, *, seconds: float = 1.5) -> Row:
        """Times steady steps of the whole engine, and of the device alone: one step's programs, repeated unread."""
        self.fill(rows, context)
        try:
            estimate, _ = self.steps(4)
            count = 4 if self.tiny else int(min(max(seconds / estimate / 3, 8), 64))
            begun = self.context()
            times = [self.steps(count)[0] for _ in range(3)]
            mean = (begun + self.context()) / 2
            device = self.device(count)
        finally:
            self.clear()
        return {
            "ms": 1e3 * float(np.median(times)),
            "spread": float((max(times) - min(times)) / np.median(times)),
            "device_ms": 1e3 * device,
            "steps": 3 * count,
            "context": mean,
        }

    def steps(self, count: int) -> tuple[float, int]:
        """Seconds per step, and the total of tokens."""
        tokens, began = 0, time.perf_counter()
        for _ in range(count):
            tokens += len(self.engine.step())
        return (time.perf_counter() - began) / count, tokens

    def device(self, count: int) -> float:
        """Seconds of one decode step of the running sequences, launched repeatedly."""
        plan = self.engine.scheduler.schedule(time.monotonic())
        assert plan is not None
        packed = self.engine._batcher.pack(plan)
        handle = self.runner.launch(packed)
        again = replace(packed, edits=[], controls=[], counts=[])
        self.runner.read(handle)
        began = time.perf_counter()
        for _ in range(count):
            handle = self.runner.launch(again)
        self.runner.read(handle)
        return (time.perf_counter() - began) / count

    def prefill(self, prompt: int, *, repeats: int = 5) -> Row:
        """The time from a request to its first token, with nothing else running."""
        times = []
        for _ in range(repeats + 1):
            began = time.perf_counter()
            self.add(prompt, 1)
            while self.engine.unfinished:
                self.engine.step()
            times.append(time.perf_counter() - began)
        kept = sorted(times[1:])
        return {"ms": 1e3 * float(np.median(kept)), "spread": (kept[-1] - kept[0]) / kept[0]}

    def run(self, requests: Sequence[tuple[int, int]], *, seconds: float) -> Done:
        """Runs all requests at once until they finish or time is up. Drops the rest; generated tokens count."""
        names = [self.add(prompt, answer) for prompt, answer in requests]
        made = dict.fromkeys(names, 0)
        began, steps = time.perf_counter(), 0
        while self.engine.unfinished and time.perf_counter() - began < seconds:
            for update in self.engine.step():
                made[update.request_id] += len(update.token_ids)
            steps += 1
        took, complete = time.perf_counter() - began, not self.engine.unfinished
        self.clear()
        prompts = (prompt for prompt, _ in requests)
        answers = [(prompt, made[name]) for prompt, name in zip(prompts, names, strict=True) if made[name]]
        return Done(took, steps, answers, complete)


_MADE: dict[bool, Rig] = {}


def rig_of(page: Page) -> Rig:
    """The rig of this process. The section that creates it records the time that this took, and gets it back."""
    tiny = page.settings.tiny
    if tiny not in _MADE:
        began = time.monotonic()
        made = _MADE[tiny] = Rig(tiny=tiny)
        page.deadline += time.monotonic() - began
        page.add(f"start of the engine, {made.programs} programs", **{f"{k}_s": v for k, v in made.seconds.items()})
    return _MADE[tiny]
