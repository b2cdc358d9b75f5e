# SPDX-License-Identifier: Apache-2.0
"""The engine: puts scheduler, batch and runner together, and orders their work. For one thread.

    add, abort            requests in and out, between steps
    step() -> updates     plans and launches a step, then reads the one before it: the host works while devices do
    update_weights, sleep, wake, reset_prefix_cache       between steps

What each part does is in its own file; no request can make a step fail. If one fails all the same, the engine is dead:
all that was in flight ends with an error, and nothing more is taken.
"""

import sys
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxserve.config import EngineConfig
from jaxserve.engine.execute import loading, memory, program_store
from jaxserve.engine.execute.loading import Told
from jaxserve.engine.execute.profiling import Profiler
from jaxserve.engine.execute.runner import Handle, Runner
from jaxserve.engine.schedule.packing import Batcher
from jaxserve.engine.schedule.plan import StepPlan
from jaxserve.engine.schedule.scheduler import Scheduler
from jaxserve.errors import EngineError, JaxserveError
from jaxserve.models.decoder import Params
from jaxserve.models.spec import ModelSpec
from jaxserve.types.metrics import Counters, EngineMetrics
from jaxserve.types.outputs import FinishReason, Update
from jaxserve.types.request import Request

type Report = Callable[[str], None]


def to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


class Engine:
    def __init__(
        self,
        config: EngineConfig,
        *,
        params: Params | None = None,
        spec: ModelSpec | None = None,
        mesh: Any = None,
        report: Report = to_stderr,
        told: Told | None = None,
        opened: "Callable[[Engine], object] | None" = None,
    ) -> None:
        """`params` of a program that holds them already, in public or engine layout, in place of the folder's.

        `told` hears how far loading is, and then compiling, which may have begun before; `opened` is called once limits
        are known.
        """
        self.config, self.report = config, report
        memory.reserve_memory(config)
        store = program_store.open_store(config.compilation_cache_dir, report)
        on = loading.on_mesh(config, mesh)
        if params is None:
            self.model, weights = loading.open_folder(config, on), None
        else:
            self.model, weights = loading.open_params(config, spec, params, on)
        free = memory.available(config, self.model)
        with loading.reading(self.model, weights, told) as reading:
            self.capacity = capacity = memory.sized(config, self.model, free, store)
            self.limits = limits = capacity.limits
            for line in capacity.lines():
                report(line)
            if opened is not None:
                opened(self)
            self.runner = Runner.of(config, self.model, capacity, store)
            if config.warmup:
                shown = _Progress(report, told, reading)
                self.runner.warm(shown, reading)
                shown.close()
            else:
                self.runner.params = reading.result()
                self.runner.allocate()
        self.scheduler = Scheduler(limits, score_rows=capacity.buckets.score_rows, seed=config.seed)
        self._batcher = Batcher(limits, capacity.buckets)
        self._in_flight: deque[tuple[StepPlan, Handle]] = deque()
        self._depth = 2 if config.async_scheduling else 1
        self._counters = Counters()
        self.profiler = Profiler()
        self.asleep = False
        self._asleep_weights: Params | None = None
        self._has_checkpoint = params is None
        self.error: str | None = None

    # --- requests ---------------------------------------------------------------------------------------------------

    def add(self, request: Request, *, hold: int = 0) -> None:
        """Raises a RequestError if it cannot be served as asked.

        hold: it stops after each token, and waits for `extend`; `branch` makes up to so many sequences of it.
        """
        self.check_alive()
        if self.asleep:
            raise JaxserveError("the engine sleeps", "wake it first")
        self.scheduler.add(request, hold=hold)
        self._counters.requests += 1
        self._counters.prompt_tokens += len(request.prompt_token_ids)

    def branch(self, request_id: str, index: int, new: int) -> None:
        """A held sequence becomes two with the same tokens; `new` is the other's index."""
        self.scheduler.branch(self.scheduler.sequence(request_id, index), new)

    def extend(self, request_id: str, index: int, token: int) -> None:
        """A held sequence continues with this token, and stops after the next."""
        self.scheduler.extend(self.scheduler.sequence(request_id, index), token)
        self._counters.generated_tokens += 1

    def drop(self, request_id: str, index: int | None = None) -> None:
        """Ends a held sequence, or all that are left of its request, without an update."""
        for sequence in list(self.scheduler.requests.get(request_id, ())):
            if index in (None, sequence.index):
                self.scheduler.drop(sequence)

    def in_flight(self) -> list[str]:
        """The ids of the requests that have not ended."""
        return list(self.scheduler.requests)

    @property
    def queued(self) -> int:
        """How many sequences wait for a row."""
        return self.scheduler.queued

    def also_ends(self, token_ids: Iterable[int]) -> None:
        """These end a text too, beside those that the checkpoint names: what its tokenizer knows."""
        known = {token for token in token_ids if 0 <= token < self.limits.vocab_size}
        self.limits = replace(self.limits, eos_token_ids=self.limits.eos_token_ids | known)
        self.scheduler.limits = self.limits

    def abort(self, request_id: str, *, index: int | None = None, reason: FinishReason = "abort") -> None:
        """The request, or one of its samples, ends; its blocks are free at once. The next step tells."""
        self.scheduler.abort(request_id, index=index, reason=reason)

    @property
    def unfinished(self) -> bool:
        """Whether steps are needed: for requests, or to tell what ended."""
        return self.scheduler.unfinished or bool(self._in_flight)

    def step(self) -> list[Update]:
        """One turn: launches a step if there is one, and reads the oldest when enough are in flight."""
        self.check_alive()
        try:
            return self._count(self._turn())
        except BaseException as error:
            self.error = f"{type(error).__name__}: {error}"
            if not isinstance(error, Exception):  # a Ctrl-C: what the step left half done is as lost
                raise
            raise EngineError(f"the engine failed: {self.error}", "start it again") from error

    def _turn(self) -> list[Update]:
        plan = self.scheduler.schedule(time.monotonic())
        if plan is not None:
            self._counters.count_step(plan.tokens)
            with self.profiler.step(self._counters.steps):
                self._in_flight.append((plan, self.runner.launch(self._batcher.pack(plan))))
        if self._in_flight and (plan is None or len(self._in_flight) >= self._depth):
            plan, handle = self._in_flight.popleft()
            return self.scheduler.commit(plan, self.runner.read(handle))
        return self.scheduler.take_ended()

    def _count(self, updates: list[Update]) -> list[Update]:
        counters = self._counters
        for update in updates:
            counters.generated_tokens += len(update.token_ids)
            if update.finish_reason is not None:
                counters.finished[update.finish_reason] += 1
                counters.cached_tokens += update.num_cached_tokens if update.index == 0 else 0
        return updates

    def fail_all(self) -> list[Update]:
        """After a fault: an end for each request that was in flight."""
        self._in_flight.clear()
        return self.scheduler.abort_all(self.error or "the engine was stopped")

    def close(self) -> None:
        """Gives the devices' memory back, for good."""
        self.error = self.error or "it was shut down"
        self.fail_all()
        if not self.asleep:
            self.runner.free()
        self.runner.params = {}

    def check_alive(self) -> None:
        if self.error is not None:
            raise EngineError(f"the engine failed before: {self.error}", "start it again")

    # --- between steps ----------------------------------------------------------------------------------------------

    def drain(self) -> list[Update]:
        """Reads what is in flight, so that the host knows all that the devices did."""
        updates: list[Update] = []
        while self._in_flight:
            plan, handle = self._in_flight.popleft()
            updates += self.scheduler.commit(plan, self.runner.read(handle))
        return self._count(updates)

    def update_weights(self, params: Params, *, version: int | None = None) -> None:
        """These parameters from the next step on; a tree of another model is refused and the old ones stay.

        Engine layout with equal shapes, dtype and shardings is taken as it is, without a copy; the public layout is
        converted on the devices. Cached prompts are forgotten. Requests in flight go on: what they computed stays.
        """
        self.check_alive()
        if version is not None and (not isinstance(version, int) or isinstance(version, bool) or version < 0):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise JaxserveError(f"the version is {version!r}", "give a whole number from 0")
        runner = self.runner
        runner.params = self._placed(params)
        self._asleep_weights = None
        self.scheduler.pool.reset()
        self.scheduler.policy_version = self.scheduler.policy_version + 1 if version is None else version

    def _placed(self, params: Params) -> Params:
        runner = self.runner
        return loading.as_engine(runner.spec, params, runner.mesh, dtype=runner.dtype, device=runner.device)

    def sleep(self, level: int = 1) -> None:
        """Gives the devices' memory back: the KV cache, and the weights, which level 1 keeps on the host and level 2
        forgets. Nothing may be in flight.
        """
        self.check_alive()
        if level not in (1, 2):
            raise JaxserveError(f"there is no sleep of level {level!r}", "give 1 (weights to the host) or 2 (dropped)")
        if self.unfinished:
            raise JaxserveError("requests are in flight", "finish or abort them before the engine sleeps")
        if self.asleep:
            raise JaxserveError("the engine sleeps already", "wake it first")
        runner = self.runner
        self.scheduler.pool.reset()
        if level == 1:
            self._asleep_weights = jax.tree.map(np.asarray, runner.params)
        # Arrays that a trainer shares with us stay: only our hold on them ends.
        runner.params = {}
        runner.free()
        self.asleep = True

    def wake(self) -> None:
        """Takes memory again and brings the weights back. After level 2 they are those that `update_weights` has given
        since, else the checkpoint's, read again, which are version 0."""
        if not self.asleep:
            raise JaxserveError("the engine does not sleep", "there is nothing to wake")
        runner = self.runner
        if self._asleep_weights is not None:
            runner.params = self._placed(self._asleep_weights)
            self._asleep_weights = None
        if not runner.params:
            if not self._has_checkpoint:
                raise JaxserveError("the weights were dropped", "give new ones with update_weights, then wake")
            runner.params = loading.read(loading.open_folder(self.config, runner.mesh))
            self.scheduler.policy_version = 0
        runner.allocate()
        self.asleep = False

    def reset_prefix_cache(self) -> None:
        """Cached prompts are forgotten; requests in flight keep what they have."""
        self.scheduler.pool.reset()

    def start_profile(self, folder: str | Path) -> None:
        self.profiler.start(folder)

    def stop_profile(self) -> Path:
        return self.profiler.stop()

    def metrics(self) -> EngineMetrics:
        free, cached, used = self.scheduler.pool.counts()
        counters = self._counters
        return EngineMetrics(
            running=len(self.scheduler.running),
            waiting=self.scheduler.queued,
            free_blocks=free,
            cached_blocks=cached,
            used_blocks=used,
            kv_usage=used / (free + cached + used),
            preemptions=self.scheduler.preemptions,
            compiled_late=self.runner.compiled_late,
            policy_version=self.scheduler.policy_version,
            steps=counters.steps,
            requests=counters.requests,
            finished=dict(counters.finished),
            prompt_tokens=counters.prompt_tokens,
            cached_tokens=counters.cached_tokens,
            generated_tokens=counters.generated_tokens,
            prefix_queries=self.scheduler.prefix_queries,
            prefix_hits=self.scheduler.prefix_hits,
            step_tokens=list(counters.step_tokens),
            computed_tokens=counters.computed_tokens,
        )


class _Progress:
    """`compiling 7/18 (12 s)`, in place on a terminal once weights are read; elsewhere now and then, and the last."""

    EVERY = 15.0  # seconds

    def __init__(self, report: Report, told: Told | None, reading: Future[Params]) -> None:
        self._report, self._told, self._reading, self._last = report, told, reading, ""
        self._live = report is to_stderr and sys.stderr.isatty()
        self._next = self.EVERY

    def __call__(self, done: int, count: int, seconds: float) -> None:
        self._last = f"compiling {done}/{count} ({seconds:.0f} s)"
        if not self._reading.done():
            return
        if self._told is not None:
            self._told("compiling", done, count)
        if self._live:
            print(f"\r{self._last}", end="", file=sys.stderr, flush=True)
        elif seconds >= self._next and done < count:
            self._next = seconds + self.EVERY
            self._report(self._last)

    def close(self) -> None:
        if self._live and self._last:
            print(f"\r{self._last}", file=sys.stderr)
        elif self._last:
            self._report(self._last)
