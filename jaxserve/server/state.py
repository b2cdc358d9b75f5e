# SPDX-License-Identifier: Apache-2.0
"""What the handlers share: the way to the engine, the tokenizer, threads for slow work, and who is being served.

One event loop uses it. The engine's life is lifecycle.py's, which fills in here what becomes known.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

from aiohttp import web

from jaxserve.errors import EngineError
from jaxserve.server import requests
from jaxserve.server.config import ServerConfig
from jaxserve.server.errors import SHUT_DOWN, ApiError
from jaxserve.server.http.guard import Held
from jaxserve.server.observe.prometheus import Metrics
from jaxserve.server.observe.request_record import Record
from jaxserve.types.outputs import RequestOutput

if TYPE_CHECKING:  # they import transformers, which takes seconds; the port answers before that
    from jaxserve.frontend.client import Front
    from jaxserve.frontend.prepare import Ready
    from jaxserve.frontend.process import EngineProcess
    from jaxserve.text.tokenizer import Tokenizer

LONGEST_WAIT = 60  # what Retry-After says at most


class Serving:
    def __init__(self, config: ServerConfig, engine: "EngineProcess", *, metrics: Metrics) -> None:
        self.config, self.engine, self.metrics = config, engine, metrics
        self.front: Front | None = None  # when requests can be taken
        self.tokenizer: Tokenizer | None = None
        self.model_names: tuple[str, ...] = config.served_model_name
        self.chat_template = config.template()
        self.created = int(time.time())
        self.draining = False
        self.asleep = False
        self.in_flight = 0  # HTTP requests that a shutdown waits for
        self.executor = ThreadPoolExecutor(config.tokenizer_workers, thread_name_prefix="jaxserve-intake")
        self._idle = asyncio.Event()
        self._idle.set()
        self._ended: list[float] = []  # when the last requests ended, for the guess at how fast a queue moves

    def check_ready(self) -> "Front":
        """The way into the engine; a 503 while it can take no requests."""
        front = self.check_engine()
        if self.asleep:
            raise unavailable("The engine sleeps. POST /wake_up wakes it.", wait=10)
        return front

    def check_engine(self) -> "Front":
        """As check_ready; what it wakes an engine with must pass while that sleeps."""
        if self.draining:
            raise unavailable("The server is shutting down.", wait=5)
        if self.front is None:
            failed = self.engine.state.phase == "failed"
            raise unavailable("The engine has failed." if failed else "The model is still loading.", wait=5)
        return self.front

    def take_engine(self, front: "Front") -> None:
        """It takes requests from now on."""
        self.front, self.tokenizer, self.asleep = front, front.intake.tokenizer, False
        self.metrics.set_limits(front.intake.limits)
        self.metrics.engine_up, self.metrics.sleep_level = True, 0

    def lose_engine(self) -> None:
        self.front, self.asleep, self.metrics.engine_up = None, False, False

    def begin(self) -> None:
        """One more HTTP request in flight."""
        self.in_flight += 1
        self._idle.clear()

    def finish(self) -> None:
        self.in_flight -= 1
        if not self.in_flight:
            self._idle.set()

    async def wait_idle(self, seconds: float) -> None:
        """Until nothing is in flight, at most so long."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._idle.wait()

    async def prepare[**P, T](self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """The result of what takes long, from a thread: tokenizing, templates, checks."""
        return await asyncio.get_running_loop().run_in_executor(self.executor, partial(function, *args, **kwargs))

    def deadline(self) -> float | None:
        """When a request that comes now must have ended, on the monotonic clock."""
        timeout = self.config.request_timeout
        return None if timeout is None else time.monotonic() + timeout

    def run(self, request: web.Request, jobs: "Sequence[Ready]") -> "AsyncGenerator[tuple[int, RequestOutput]]":
        """The outputs of one HTTP request's jobs, each with the job's place, as they come.

        Leaving it aborts what has not ended: use contextlib.aclosing. A full queue is a 503 and a deadline that has
        passed a 504, raised here.
        """
        return requests.run(self, request[RECORD], jobs)

    def lost(self, error: EngineError) -> Exception:
        """What to tell of a request that ended with the engine."""
        ended = self.draining and self.engine.state.phase != "failed"
        return unavailable(SHUT_DOWN, wait=5) if ended else error

    def note_end(self) -> None:
        self._ended = [*self._ended[-63:], time.monotonic()]

    def retry_after(self) -> int:
        """Seconds in which the queue may have room: what waits, at the pace of late."""
        stats = self.engine.stats
        now = time.monotonic()
        recent = [moment for moment in self._ended if now - moment < LONGEST_WAIT]
        if stats is None or len(recent) < 2:
            return 1
        pace = len(recent) / max(now - recent[0], 0.1)
        return min(max(round(stats.waiting / pace), 1), LONGEST_WAIT)


SERVING = web.AppKey("serving", Serving)
RECORD = web.RequestKey("record", Record)
HELD = web.RequestKey("held", Held)


def unavailable(message: str, *, wait: int) -> ApiError:
    return ApiError(503, message, headers={"Retry-After": str(wait)})
