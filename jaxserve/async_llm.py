# SPDX-License-Identifier: Apache-2.0
"""AsyncLLM: a model in this process, for programs with an event loop. Requests come and go at any time.

The engine runs in a thread of its own (worker.py); here are its callers, in any number of event loops. Outputs wait
for a slow consumer as one that grows, never as a queue.
"""

import asyncio
import itertools
import threading
import time
import weakref
from collections.abc import AsyncGenerator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from jaxserve.engine.outputs import OutputBuilder
from jaxserve.errors import JaxserveError, RequestError
from jaxserve.intake import Prompt, opened
from jaxserve.metrics import EngineMetrics
from jaxserve.models.decoder import Params
from jaxserve.models.spec import ModelSpec
from jaxserve.tokenizer import Tokenizer
from jaxserve.types import RequestOutput, SamplingParams, number
from jaxserve.worker import Mailbox, Stream, Worker


class AsyncLLM:
    """Made like LLM. Use it as a context manager, or await `shutdown`."""

    def __init__(
        self,
        model: str,
        *,
        params: Params | None = None,
        spec: ModelSpec | None = None,
        mesh: Any = None,
        **settings: Any,
    ) -> None:
        self._engine, self._intake = opened(model, settings, params=params, spec=spec, mesh=mesh)
        self._worker = Worker(self._engine)
        self._lock = threading.Lock()
        self._streams: dict[str, Stream] = {}  # by the caller's ids, those that are not finished
        self._mailboxes: dict[asyncio.AbstractEventLoop, Mailbox] = {}
        self._ids = itertools.count()
        self._end = weakref.finalize(self, self._worker.stop)  # when nobody holds this any more, or Python exits

    async def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        priority: int = 0,
        timeout: float | None = None,
    ) -> AsyncGenerator[RequestOutput]:
        """Outputs of the kind that `sampling_params.output_kind` says, as they come.

        A request that takes longer than `timeout` seconds, waiting included, ends with finish_reason "abort". What
        came while the consumer was busy comes as one. Who leaves the loop early aborts the request.
        """
        params = self._intake.default_params() if sampling_params is None else sampling_params
        deadline = None if timeout is None else time.monotonic() + number("timeout", timeout, above=0)
        stream = self._opened(prompt, params, request_id, priority, deadline)
        try:
            while not stream.finished:
                yield await stream.next()
        finally:
            self._forget(stream)

    def _opened(
        self, prompt: Prompt, params: SamplingParams, request_id: str | None, priority: int, deadline: float | None
    ) -> Stream:
        self._worker.check_alive()
        loop = asyncio.get_running_loop()
        name = self._intake.next_id() if request_id is None else request_id
        job = self._intake.ready(prompt, params, request_id=name, priority=priority, deadline=deadline)
        builder = OutputBuilder(self._intake.tokenizer, job.request, prompt=job.prompt)
        # The engine's id is never used twice: what it still says of an earlier request reaches nobody.
        request = replace(job.request, id=f"{next(self._ids)}:{name}")
        with self._lock:
            if name in self._streams:
                raise RequestError("request_id", f"a request {name!r} is in flight", "give another id")
            stream = self._streams[name] = Stream(request, builder, self._mailbox(loop), name=name)
        try:
            self._worker.add(stream)
        except BaseException:
            self._forget(stream)
            raise
        return stream

    def _mailbox(self, loop: asyncio.AbstractEventLoop) -> Mailbox:
        if loop not in self._mailboxes:
            for other in [other for other in self._mailboxes if other.is_closed()]:
                del self._mailboxes[other]
            self._mailboxes[loop] = Mailbox(loop)
        return self._mailboxes[loop]

    def _forget(self, stream: Stream) -> None:
        with self._lock:
            self._streams.pop(stream.name, None)
        if not stream.finished:
            self._worker.drop(stream)

    async def abort(self, request_id: str) -> None:
        """Ends a request; its consumer gets a last output. Unknown ids have ended already."""
        with self._lock:
            stream = self._streams.get(request_id)
        if stream is not None:
            await self._do(lambda: self._engine.abort(stream.request.id))

    # --- between steps ----------------------------------------------------------------------------------------------

    async def _do[T](self, function: Callable[[], T]) -> T:
        """Has the engine's thread do this between two steps."""
        return await asyncio.wrap_future(self._worker.call(function))

    async def update_weights(self, params: Params, version: int | None = None) -> None:
        """As LLM.update_weights. Requests in flight go on with the new parameters from their next token."""
        await self._do(lambda: self._engine.update_weights(params, version=version))

    async def sleep(self, level: int = 1) -> None:
        """As LLM.sleep; refused while requests are in flight."""
        await self._do(lambda: self._engine.sleep(level))

    async def wake(self) -> None:
        await self._do(self._engine.wake)

    wake_up = wake

    async def reset_prefix_cache(self) -> None:
        await self._do(self._engine.reset_prefix_cache)

    async def metrics(self) -> EngineMetrics:
        return await self._do(self._engine.metrics)

    async def start_profile(self, folder: str | Path) -> None:
        await self._do(lambda: self._engine.profiler.start(folder))

    async def stop_profile(self) -> Path:
        return await self._do(self._engine.profiler.stop)

    # --- the rest ---------------------------------------------------------------------------------------------------

    @property
    def spec(self) -> ModelSpec:
        return self._engine.runner.spec

    def get_default_sampling_params(self) -> SamplingParams:
        return self._intake.default_params()

    def get_tokenizer(self) -> Tokenizer:
        if self._intake.tokenizer is None:
            raise JaxserveError("there is no tokenizer", "name one with tokenizer=")
        return self._intake.tokenizer

    def check_health(self) -> None:
        """Raises an EngineError if the engine failed or was shut down."""
        self._worker.check_alive()

    async def shutdown(self) -> None:
        """Ends the engine's thread; requests in flight end with an EngineError."""
        await asyncio.get_running_loop().run_in_executor(None, self._end)

    async def __aenter__(self) -> "AsyncLLM":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.shutdown()
