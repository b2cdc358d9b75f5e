# SPDX-License-Identifier: Apache-2.0
"""An engine process without a model: `python -m tests.server.fake_engine FAULTS --fd N`. It starts at once.

To the parent it behaves like the real child: messages, heartbeat, exit. Each step gives each request one more token.

slow=S          a step takes S seconds
raise=N         the Nth step raises
hang=N          the Nth step never ends
load=S          opening the model takes S seconds
refuse          the model cannot be opened
pending=N       N programs are still to be compiled
noise           opening the model warns, logs and prints a traceback
"""

import logging
import sys
import time
import traceback
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn, cast

from jaxserve.engine.capacity import Limits
from jaxserve.errors import CheckpointError, JaxserveError
from jaxserve.frontend import wire
from jaxserve.host import child
from jaxserve.types.metrics import Counters, EngineMetrics, StepClock
from jaxserve.types.outputs import Update
from jaxserve.types.request import Request

LIMITS = Limits(
    vocab_size=1000,
    max_model_len=2048,
    max_num_seqs=8,
    max_num_batched_tokens=64,
    block_size=8,
    num_blocks=1025,
    max_logprobs=8,
)


class FakeEngine:
    compiling = False  # nothing in the background

    def __init__(self, faults: dict[str, float]) -> None:
        self._faults, self._counters, self._times = faults, Counters(), StepClock()
        self._left: dict[str, list[int]] = {}  # tokens still to come, of each sample
        self._ended: list[Update] = []
        self._folder: str | None = None
        self._traces = 0

    @property
    def unfinished(self) -> bool:
        return bool(self._left or self._ended)

    def add(self, request: Request) -> None:
        self._left[request.id] = [request.params.max_tokens or 16] * request.params.n

    def abort(self, request_id: str, *, index: int | None = None, reason: Any = "abort") -> None:
        left = self._left.pop(request_id, [])
        self._ended += [Update(request_id=request_id, index=each, finish_reason=reason) for each in range(len(left))]

    def also_ends(self, token_ids: Iterable[int]) -> None:
        pass

    def start_profile(self, folder: str) -> None:
        if self._folder is not None:
            raise JaxserveError(f"a trace to {self._folder} is already running", "stop it first")
        self._folder = folder

    def stop_profile(self) -> str:
        if self._folder is None:
            raise JaxserveError("no trace is running", "start one first")
        folder, self._folder = self._folder, None
        self._traces += 1
        (Path(folder) / "plugins/profile" / f"2026_{self._traces:02d}").mkdir(parents=True)
        return folder

    def step(self) -> list[Update]:
        self._times.launch(time.monotonic())
        time.sleep(self._faults.get("slow", 0.0))
        self._times.read(len(self._left), time.monotonic())
        self._counters.count_step(len(self._left))
        if self._counters.steps == self._faults.get("raise"):
            raise ValueError("the device at 0x7f00deadbeef, see /tmp/dump")
        if self._counters.steps == self._faults.get("hang"):
            time.sleep(3600)
        updates, self._ended = self._ended, []
        for request_id, left in list(self._left.items()):
            for index in range(len(left)):
                left[index] -= 1
                reason = None if left[index] else "length"
                updates.append(Update(request_id=request_id, index=index, token_ids=[5], finish_reason=reason))
            if not left[0]:
                del self._left[request_id]
        return updates

    def metrics(self) -> EngineMetrics:
        running = len(self._left)
        counters = self._counters
        return EngineMetrics(
            running=running,
            waiting=0,
            free_blocks=1024 - running,
            cached_blocks=0,
            used_blocks=running,
            kv_usage=running / 1024,
            steps=counters.steps,
            preemptions=0,
            compiled_late=0,
            requests=0,
            finished=counters.finished,
            prompt_tokens=0,
            cached_tokens=0,
            generated_tokens=0,
            policy_version=0,
            prefix_queries=0,
            prefix_hits=0,
            step_tokens=counters.step_tokens,
            computed_tokens=counters.computed_tokens,
            step_seconds=self._times.seconds,
            programs_compiled=9,
            programs_pending=int(self._faults.get("pending", 0)),
        )


def _make_noise() -> None:
    warnings.warn("of the engine's process", UserWarning, stacklevel=1)
    logging.getLogger("a.library").warning("a library's log of the engine's process")
    try:
        raise ValueError("caught")
    except ValueError:
        traceback.print_exc()


def main() -> NoReturn:
    faults: dict[str, float] = {}
    for fault in sys.argv.pop(1).split(","):
        name, _, number = fault.partition("=")
        faults[name] = float(number or 1)
    serve(faults)


def serve(faults: dict[str, float]) -> NoReturn:
    def load(start: wire.Start, outbox: Any) -> Any:
        outbox.send(wire.Progress("loading", 7, 18))
        time.sleep(faults.get("load", 0.0))
        if "noise" in faults:
            _make_noise()
        if "refuse" in faults:
            raise CheckpointError("there is no model here", "give another")
        opened = wire.ModelOpened(
            folder=start.config["model"],
            limits=LIMITS,
            sampling_defaults={},
            family="fake",
            layers=0,
            dtype="float32",
            parameters=0,
            weight_bytes=0,
        )
        outbox.send(opened)
        return FakeEngine(faults)

    cast(Any, child)._load = load
    child.BEAT = 0.2
    child.main()


if __name__ == "__main__":
    main()
