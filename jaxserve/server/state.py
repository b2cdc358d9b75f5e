# SPDX-License-Identifier: Apache-2.0
"""State shared by the handlers: the engine's client, the tokenizer, threads for slow work, requests in flight.

For one event loop. lifecycle.py starts and ends engines and updates this state.
"""

import asyncio
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress

from aiohttp import web

from jaxserve.errors import EngineError
from jaxserve.frontend.client import EngineClient
from jaxserve.frontend.pooling import Pooling
from jaxserve.frontend.process import EngineProcess
from jaxserve.server import estimate
from jaxserve.server.config import ServerConfig
from jaxserve.server.errors import SHUT_DOWN, ApiError
from jaxserve.server.estimate import Estimator, Load
from jaxserve.server.http.api_keys import KeyRing
from jaxserve.server.http.auth import Access
from jaxserve.server.http.entrance import Entrance
from jaxserve.server.http.guard import Held
from jaxserve.server.http.rate_limit import Grant, Limiter
from jaxserve.server.observe.prometheus import Metrics
from jaxserve.server.observe.request_record import RequestRecord
from jaxserve.server.observe.traces import RequestTrace, Tracer
from jaxserve.server.unknown_fields import IgnoredNames
from jaxserve.server.workers import Workers
from jaxserve.text.tokenizer import Tokenizer
from jaxserve.types.request import Request


class Serving:
    def __init__(self, config: ServerConfig, engine: EngineProcess, *, metrics: Metrics) -> None:
        self.config, self.engine, self.metrics = config, engine, metrics
        self.client: EngineClient | None = None  # None until requests can be accepted
        self.tokenizer: Tokenizer | None = None
        self.pooling = Pooling()
        self.model_names: tuple[str, ...] = config.served_model_name
        self.chat_template = config.template()
        self.ignored = IgnoredNames(config.unknown_fields)
        self.keys = KeyRing(config.keys())
        self.access = Access(config, self.keys)
        self.limiter = Limiter(config.default_limit(), metrics.rate_limited)
        self.tracer = None if config.otlp_traces_endpoint is None else Tracer(config.otlp_traces_endpoint)
        self.created = int(time.time())
        self.draining = False
        self.asleep = False
        self.in_flight = 0  # HTTP requests that a shutdown waits for
        self.workers = Workers(config.tokenizer_workers)
        self.entrance = Entrance()
        self._idle = asyncio.Event()
        self._idle.set()
        self.estimator = Estimator()

    def check_ready(self) -> EngineClient:
        """The engine's client. Raises a 503 if it cannot accept requests."""
        client = self.check_engine()
        self.check_awake()
        return client

    def check_awake(self) -> None:
        if self.asleep:
            self.metrics.rejections["asleep"] += 1
            raise unavailable("The engine is asleep. Wake it with POST /wake_up.", wait=10)

    def check_engine(self) -> EngineClient:
        """Like check_ready, but accepts a sleeping engine, which /wake_up must reach."""
        if self.draining:
            raise unavailable("The server is shutting down.", wait=5)
        if self.client is None:
            state = self.engine.state
            if state.phase == "failed":
                raise unavailable("The engine has failed.", wait=5)
            wait = estimate.until_loaded(done=state.done, total=state.total, seconds=time.monotonic() - state.since)
            about = f" ({state.detail})" if state.total else ""
            raise unavailable(f"The model is still loading{about}.", wait=wait)
        return self.client

    def take_engine(self, client: EngineClient, pooling: Pooling) -> None:
        """Accept requests from now on."""
        self.pooling = pooling
        self.client, self.tokenizer, self.asleep = client, client.preparer.tokenizer, False
        self.metrics.set_limits(client.preparer.limits)
        self.metrics.engine_up, self.metrics.sleep_level = True, 0

    def lose_engine(self) -> None:
        self.client, self.asleep, self.metrics.engine_up = None, False, False

    @contextmanager
    def working(self) -> Generator[None]:
        """Count an HTTP request as in flight."""
        self.in_flight += 1
        self._idle.clear()
        try:
            yield
        finally:
            self.in_flight -= 1
            if not self.in_flight:
                self._idle.set()

    async def wait_idle(self, seconds: float) -> None:
        """Wait until nothing is in flight, at most `seconds`."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._idle.wait()

    def deadline(self) -> float | None:
        """The deadline of a request that arrives now, on the monotonic clock."""
        timeout = self.config.request_timeout
        return None if timeout is None else time.monotonic() + timeout

    def lost(self, error: EngineError) -> Exception:
        """The error for a request that ended with the engine."""
        ended = self.draining and self.engine.state.phase != "failed"
        return unavailable(SHUT_DOWN, wait=5) if ended else error

    def load(self, client: EngineClient) -> Load:
        return Load(open=client.open_sequences(), stats=self.engine.stats, limits=client.preparer.limits)

    def check_in_time(self, client: EngineClient, requests: Sequence[Request]) -> None:
        """Raise a 503 for requests that cannot meet their deadline."""
        deadline = min((each.deadline for each in requests if each.deadline is not None), default=None)
        if deadline is None:
            return
        left = deadline - time.monotonic()
        found = self.estimator.of(requests, self.load(client))
        if left <= 0 or found.total <= left:  # what is late already, the engine ends
            return
        self.metrics.rejections["deadline"] += 1
        message = f"This request cannot be done within its timeout: {estimate.shown(left)} s are left, "
        message += f"and it is estimated to take at least {estimate.shown(found.total)} s"
        if found.queue:
            message += f" ({estimate.shown(found.queue)} s of them in the queue)"
        if found.compute > left:  # retrying does not help
            raise ApiError(503, f"{message}. Raise the timeout, or lower max_tokens.")
        wait = estimate.whole(found.total - left)
        raise unavailable(f"{message}. Retry later, or raise the timeout.", wait=wait)


SERVING = web.AppKey("serving", Serving)
RECORD = web.RequestKey("record", RequestRecord)
TRACE = web.RequestKey("trace", RequestTrace)
GRANT = web.RequestKey("grant", Grant)
HELD = web.RequestKey("held", Held)


def unavailable(message: str, *, wait: int) -> ApiError:
    return ApiError(503, message, headers={"Retry-After": str(wait)})
