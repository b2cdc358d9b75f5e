# SPDX-License-Identifier: Apache-2.0
"""The engine: connects scheduler, batcher and runner, and runs their steps. Not thread-safe.

    add, abort            add and end requests, between steps
    step() -> updates     plans and launches a step, then reads the previous one, so that host and devices overlap
    update_weights, sleep, wake, reset_prefix_cache       between steps

Requests are checked when they are added, so none can make a step fail. If one fails nevertheless while it is packed or
its result is applied, it ends with an error and the others are not affected. If a step itself fails, the engine is
dead: all requests in flight end with an error, and it accepts no more.
"""

import time
import traceback
import weakref
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxserve.config import EngineConfig
from jaxserve.engine.execute import cpu_forms, jax_start, loading, memory, program_store, weights
from jaxserve.engine.execute.background import Background
from jaxserve.engine.execute.loading import OnProgress
from jaxserve.engine.execute.profiling import Profiler
from jaxserve.engine.execute.recorder import Recorder
from jaxserve.engine.execute.runner import Handle, ProgramKey, Runner
from jaxserve.engine.execute.weights import Conversion
from jaxserve.engine.progress import Report, StartProgress, to_stderr
from jaxserve.engine.schedule.drafts import Drafter
from jaxserve.engine.schedule.masks import Masks
from jaxserve.engine.schedule.packing import Batcher, StepMessage
from jaxserve.engine.schedule.plan import StepPlan
from jaxserve.engine.schedule.scheduler import Scheduler
from jaxserve.errors import EngineError, JaxserveError
from jaxserve.models import param_layout
from jaxserve.models.decoder import Params
from jaxserve.models.spec import ModelSpec
from jaxserve.types.metrics import Counters, EngineMetrics, StepClock
from jaxserve.types.outputs import FinishReason, Update
from jaxserve.types.request import Request


class Engine:
    def __init__(
        self,
        config: EngineConfig,
        *,
        params: Params | None = None,
        spec: ModelSpec | None = None,
        mesh: Any = None,
        report: Report = to_stderr,
        on_progress: OnProgress | None = None,
        opened: "Callable[[Engine], object] | None" = None,
    ) -> None:
        """`params`: parameters that the program already holds, in public or engine layout, instead of the folder's.

        `on_progress` is called with the progress of loading, then of compiling, which may overlap. `opened` is called
        once the limits are known.
        """
        self.config, self.report = config, report
        jax_start.start(config)
        store = program_store.open_store(config.compilation_cache_dir, report)
        on = loading.on_mesh(config, mesh)
        if params is None:
            self.model, held = loading.open_folder(config, on), None
        else:
            self.model, held = loading.open_params(config, spec, params, on)
        if store is not None and on is None and weights.device_of(self.model.shapes).platform == "cpu":
            cpu_forms.prepare(store.folder, self.model.spec)
        free = memory.available(config, self.model)
        with loading.reading(self.model, held, on_progress) as reading:
            self.capacity = capacity = memory.sized(config, self.model, free, store)
            self.limits = limits = capacity.limits
            for line in capacity.lines():
                report(line)
            if config.enable_sleep_mode and not self.returns_memory:
                report(f"enable_sleep_mode has no effect: {jax_start.KEEPS_MEMORY}")
            if opened is not None:
                opened(self)
            self.runner = Runner.of(config, self.model, capacity, store)
            if config.warmup == "none":
                self.runner.params = reading.result()
                self.runner.allocate()
            else:
                shown = StartProgress(report, on_progress, reading)
                self._warm(shown, reading)
                shown.close()
        self.scheduler = Scheduler(
            limits, score_rows=capacity.buckets.score_rows, seed=config.seed, hash_seed=config.prefix_hash_seed
        )
        self._batcher = Batcher(limits, capacity.buckets, self.runner.available)
        self._in_flight: deque[tuple[StepPlan, Handle]] = deque()
        self._depth = 2 if config.async_scheduling else 1
        self._counters, self._times = Counters(), StepClock()
        self.profiler = Profiler()
        self.asleep = False
        self._asleep_weights: Params | None = None
        self._has_checkpoint = params is None
        self._recorder: Recorder | None = None
        if config.record_steps:
            self._recorder = Recorder(config, limits, self.model.spec, has_folder=params is None)
        self.error: str | None = None
        self._background = self._compile_the_rest() if config.warmup == "staged" else None

    def _warm(self, progress: StartProgress, reading: Future[Params]) -> None:
        runner = self.runner
        if self.config.warmup == "all":
            runner.warm(progress, reading)
        else:  # recorded steps must run the same programs again in a replay
            by_layers = runner.compiles_by_layers and not self.config.record_steps
            runner.warm(progress, reading, keys=runner.covering(), by_layers=by_layers)

    def _compile_the_rest(self) -> Background[ProgramKey] | None:
        background = self.runner.missing(self.report)
        if not background.remaining:
            return None
        done = self.runner.num_compiled
        self.report(f"ready with {done} of {done + background.remaining} programs; compiling the others")
        weakref.finalize(self, background.stop).atexit = False
        background.start()
        return background

    @property
    def compiling(self) -> bool:
        """Whether programs are compiled in the background, which `adopt` lets steps use."""
        return self._background is not None and not self.asleep

    def adopt(self) -> None:
        """Let steps use what was compiled in the background. `step` does this too; an idle engine needs it."""
        background, runner = self._background, self.runner
        if background is None or self.asleep:
            return
        running = background.running  # asked first: the last program may become ready in between
        count = len(background.ready)
        if not running and not count:
            self._background = None
        for _ in range(count if runner.on_cpu else min(count, 1)):  # a program runs once when it is adopted on a GPU
            runner.adopt(*background.ready.popleft())

    # --- requests ---------------------------------------------------------------------------------------------------

    def add(
        self, request: Request, *, hold: int = 0, masked_by: Masks | None = None, drafted_by: Drafter | None = None
    ) -> None:
        """Queue a request. Raises RequestError if it cannot be served as sent.

        hold: the number of beams, if not 0. Each stops after every token and waits for `extend`; `branch` forks them.
        masked_by: decides before each token which ones may follow.
        drafted_by: guesses tokens, so that a step can give several. The tokens are the same as without; see drafts.py.
        """
        self.check_awake()
        self.scheduler.add(request, hold=hold, masked_by=masked_by, drafted_by=drafted_by)
        self._counters.requests += 1
        self._counters.prompt_tokens += len(request.prompt_token_ids)

    def branch(self, request_id: str, index: int, new: int) -> None:
        """Fork a held sequence; `new` is the fork's index."""
        self.scheduler.branch(self.scheduler.sequence(request_id, index), new)

    def extend(self, request_id: str, index: int, token: int) -> None:
        """Continue a held sequence with this token. It stops again after the next."""
        self.scheduler.extend(self.scheduler.sequence(request_id, index), token)
        self._counters.generated_tokens += 1

    def drop(self, request_id: str, index: int | None = None) -> None:
        """End a held sequence, or all remaining ones of its request, without an update."""
        for sequence in list(self.scheduler.requests.get(request_id, ())):
            if index in (None, sequence.index):
                self.scheduler.drop(sequence)

    def in_flight(self) -> list[str]:
        """The ids of unfinished requests."""
        return list(self.scheduler.requests)

    @property
    def queued(self) -> int:
        """The number of sequences that wait for a row."""
        return self.scheduler.queued

    def also_ends(self, token_ids: Iterable[int]) -> None:
        """Add the tokenizer's end-of-text tokens to those of the checkpoint."""
        known = {token for token in token_ids if 0 <= token < self.limits.vocab_size}
        self.limits = replace(self.limits, eos_token_ids=self.limits.eos_token_ids | known)
        self.scheduler.limits = self.limits

    def abort(self, request_id: str, *, index: int | None = None, reason: FinishReason = "abort") -> None:
        """End a request, or one of its samples, and free its blocks immediately. The next step returns the update."""
        self.scheduler.abort(request_id, index=index, reason=reason)

    @property
    def unfinished(self) -> bool:
        """Whether steps are needed, for requests or to return the updates of those that ended."""
        return self.scheduler.unfinished or bool(self._in_flight)

    def step(self) -> list[Update]:
        """Launch the next step, if any, and read the oldest once enough are in flight."""
        self.check_alive()
        try:
            return self._count(self._turn())
        except BaseException as error:
            self.error = f"{type(error).__name__}: {error}{self._dumped(error)}"
            self._stop_compiling()
            if not isinstance(error, Exception):  # Ctrl-C: the interrupted step leaves the engine as unusable
                raise
            raise EngineError(f"the engine failed: {self.error}", "restart it") from error

    def _stop_compiling(self) -> None:
        if self._background is not None:
            self._background.stop()
            self._background = None

    def _turn(self) -> list[Update]:
        if self._background is not None:
            self.adopt()
        plan = self.scheduler.schedule(time.monotonic())
        message = None if plan is None else self._packed(plan)
        updates: list[Update] | None = None
        if plan is not None and message is not None:
            self._counters.count_step(plan.tokens)
            with self.profiler.step(self._counters.steps):
                updates = self._launch(plan, message)
        if updates is None and self._in_flight and (message is None or len(self._in_flight) >= self._depth):
            updates = self._read()
        return self.scheduler.take_ended() if updates is None else updates

    def _packed(self, plan: StepPlan) -> StepMessage | None:
        """The plan's message. A sequence that cannot be packed ends with an error, and the plan is withdrawn."""
        try:
            return self._batcher.pack(plan)
        except Exception as error:
            traceback.print_exc()
            at_fault = self._batcher.at_fault(plan)
            self.scheduler.withdraw(plan, at_fault, f"the request cannot be computed: {type(error).__name__}: {error}")
            return None

    def _launch(self, plan: StepPlan, message: StepMessage) -> list[Update] | None:
        """Launch a step. If its head waits for masks, the step before is read meanwhile; returns its updates."""
        runner, recorder, updates = self.runner, self._recorder, None
        self._times.launch(time.monotonic())
        if recorder is not None:
            recorder.launched(message)
        if plan.masked:
            handle = runner.launch_model(message)
            if self._in_flight:
                updates = self._read()
            masks = self.scheduler.masks_of(plan)
            if recorder is not None:
                recorder.masked(masks)
            runner.launch_head(handle, masks)
        else:
            handle = runner.launch(message)
        self._in_flight.append((plan, handle))
        return updates

    def _read(self) -> list[Update]:
        """Wait for the oldest step in flight."""
        plan, handle = self._in_flight.popleft()
        result = self.runner.read(handle)
        self._times.read(plan.tokens, time.monotonic())
        if self._recorder is not None:
            self._recorder.read(result)
        return self.scheduler.commit(plan, result)

    def _count(self, updates: list[Update]) -> list[Update]:
        counters = self._counters
        for update in updates:
            counters.generated_tokens += len(update.token_ids)
            if update.finish_reason is not None:
                counters.finished[update.finish_reason] += 1
                counters.cached_tokens += update.num_cached_tokens if update.index == 0 else 0
        return updates

    def _dumped(self, error: BaseException) -> str:
        """Write the recorded steps to a file; its name as part of a message."""
        if self._recorder is None or not isinstance(error, Exception):
            return ""
        try:
            file = self._recorder.dump(f"{type(error).__name__}: {error}", self.scheduler.policy_version)
        except OSError as refused:
            return f" (the steps before it could not be written: {refused})"
        return f" (the steps before it are in {file}; see jaxserve replay)"

    def fail_all(self) -> list[Update]:
        """End every request in flight, after a fault; return their last updates."""
        self._in_flight.clear()
        return self.scheduler.abort_all(self.error or "the engine was stopped")

    def close(self) -> None:
        """Shut down: free the devices' memory."""
        self.error = self.error or "it was shut down"
        self.fail_all()
        self._stop_compiling()
        if not self.asleep:
            self.runner.free()
        self.runner.params = {}
        self.runner.forget_programs()

    def check_alive(self) -> None:
        if self.error is not None:
            raise EngineError(f"the engine has failed: {self.error}", "restart it")

    def check_awake(self) -> None:
        self.check_alive()
        if self.asleep:
            raise JaxserveError("the engine is asleep", "wake it first")

    # --- between steps ----------------------------------------------------------------------------------------------

    def drain(self) -> list[Update]:
        """Read all steps in flight."""
        updates: list[Update] = []
        while self._in_flight:
            updates += self._read()
        return self._count(updates)

    def update_weights(self, params: Params, *, version: int | None = None) -> None:
        """Use these parameters from the next step on. Raises, and keeps the old ones, if they are of another model.

        Arrays that are already as the engine needs them are used without a copy, others are converted on the devices.
        Resets the prefix cache. Requests in flight continue and keep their computed KV.
        """
        self.replace_weights(self.conversions(params), version=version)

    def conversions(self, params: Params) -> list[Conversion]:
        """Check new parameters, and compile what their conversion needs. May be called by any thread."""
        runner = self.runner
        return weights.conversions(runner.spec, params, runner.mesh, device=runner.device)

    def replace_weights(self, found: list[Conversion], *, version: int | None = None) -> None:
        """The rest of `update_weights`, between two steps.

        One tensor after the other is converted, then takes the place of the old one, which is freed unless the program
        holds it too. The largest comes first: where memory is short, it is refused, and nothing is replaced. A fault
        after that ends the engine, since its parameters would be of two models.
        """
        self.check_alive()
        if version is not None and (not isinstance(version, int) or isinstance(version, bool) or version < 0):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise JaxserveError(f"version is {version!r}", "use a whole number of at least 0")
        if self._in_flight:
            jax.block_until_ready(self.runner.last)  # steps that still compute hold the old parameters
        params: Params = self.runner.params or {}  # none while asleep
        replaced = 0
        try:
            for each in found:
                param_layout.put(params, each.path, each.run())
                replaced += 1
        except BaseException as error:
            if not replaced or not self.runner.params:
                raise
            self.error = f"only {replaced} of {len(found)} parameters were replaced: {type(error).__name__}: {error}"
            raise EngineError(f"the engine failed: {self.error}", "restart it") from error
        self.runner.params, self._asleep_weights = params, None
        self.scheduler.pool.reset()
        self.scheduler.policy_version = self.scheduler.policy_version + 1 if version is None else version

    def weights(self) -> Params:
        """The parameters in engine layout: the engine's own arrays, in a new tree."""
        self.check_awake()
        return jax.tree.map(lambda leaf: leaf, self.runner.params)

    def public_params(self, params: Params, *, copy: bool = True) -> Params:
        """The parameters of `weights` in public layout. May be called by any thread."""
        return weights.as_public(self.runner.spec, params, self.runner.mesh, copy=copy)

    def sleep(self, level: int = 1) -> bool:
        """Free the devices' memory: the KV cache and the weights. Level 1 keeps the weights on the host, level 2 drops
        them. No request may be in flight.

        Returns whether other processes can use the memory. If not, jax keeps it for this process.
        """
        self.check_alive()
        if level not in (1, 2):
            raise JaxserveError(
                f"unknown sleep level {level!r}", "use 1 to keep the weights in host memory, or 2 to discard them"
            )
        if self.unfinished:
            raise JaxserveError("requests are in flight", "finish or abort them before putting the engine to sleep")
        if self.asleep:
            raise JaxserveError("the engine is already asleep", "wake it first")
        runner = self.runner
        self.scheduler.pool.reset()
        if level == 1:
            self._asleep_weights = jax.tree.map(np.asarray, runner.params)
        # Only drop the references: a trainer may still use these arrays.
        runner.params = {}
        runner.free()
        self.asleep = True
        if self._background is not None:
            self._background.pause()
        shared = self.returns_memory
        kept = "discarded" if level == 2 else "kept in host memory"
        whose = "to all processes" if shared else f"to this process only ({jax_start.KEEPS_MEMORY})"
        self.report(f"asleep: weights are {kept}; freed device memory is available {whose}")
        return shared

    @property
    def returns_memory(self) -> bool:
        """Whether memory that it frees is free for other processes too."""
        return all(map(jax_start.returns_memory, memory.devices_of(self.model)))

    def wake(self) -> None:
        """Allocate memory again and restore the weights. After level 2 these are the ones from `update_weights`, if it
        was called since, else the checkpoint's, read again, as version 0."""
        if not self.asleep:
            raise JaxserveError("the engine is not asleep", "call sleep first")
        runner = self.runner
        if self._asleep_weights is not None:
            runner.params = weights.as_engine(runner.spec, self._asleep_weights, runner.mesh, device=runner.device)
            self._asleep_weights = None
        if not runner.params:
            if not self._has_checkpoint:
                raise JaxserveError(
                    "the weights were discarded", "load new ones with update_weights, then wake the engine"
                )
            runner.params = loading.read(loading.open_folder(self.config, runner.mesh))
            self.scheduler.policy_version = 0
        runner.allocate()
        if self._recorder is not None:
            self._recorder.restart()
        self.asleep = False
        if self._background is not None:
            self._background.resume()

    def reset_prefix_cache(self) -> None:
        """Drop all cached prefixes. Requests in flight keep their blocks."""
        self.scheduler.pool.reset()

    def start_profile(self, folder: str | Path) -> None:
        self.profiler.start(folder)

    def stop_profile(self) -> Path:
        return self.profiler.stop()

    def metrics(self) -> EngineMetrics:
        free, cached, used = self.scheduler.pool.counts()
        counters, background = self._counters, self._background
        ready, pending = (0, 0) if background is None else (len(background.ready), background.remaining)
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
            programs_compiled=self.runner.num_compiled + ready,
            programs_pending=pending,
            step_seconds=list(self._times.seconds),
        )
