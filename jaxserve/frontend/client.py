# SPDX-License-Identifier: Apache-2.0
"""The client of an engine, for callers in any number of event loops. The engine may be in a thread or another process.

AsyncLLM and the server use it. It opens a stream for each request, and aborts a request whose consumer has left.
"""

import asyncio
import itertools
import threading
from collections import Counter
from collections.abc import AsyncGenerator
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from jaxserve.config import EngineConfig
from jaxserve.errors import EngineError, JaxserveError, RequestError
from jaxserve.frontend.outputs import OutputBuilder
from jaxserve.frontend.prepare import Preparer, preparer_for, tokenizer_of
from jaxserve.frontend.process import EngineProcess
from jaxserve.frontend.streams import Mailbox, Stream
from jaxserve.types.outputs import RequestOutput
from jaxserve.types.request import Request


class EngineLink(Protocol):
    """The connection to an engine. Thread-safe; no method waits for the engine."""

    def check_alive(self) -> None:
        """Raise the EngineError that the engine ended with, if it has ended."""
        ...

    def add(self, stream: Stream) -> None:
        """Send its request. The stream gets the outputs, or the error if the engine rejects the request."""
        ...

    def drop(self, stream: Stream) -> None:
        """End the request of a stream without a consumer."""
        ...

    def call(self, name: str, /, **arguments: Any) -> Future[Any]:
        """Call the engine's method of this name between two steps."""
        ...


class EngineClient:
    def __init__(self, link: EngineLink, preparer: Preparer) -> None:
        self.link, self.preparer = link, preparer
        self._lock = threading.Lock()
        self._streams: dict[str, Stream] = {}  # unfinished streams, by the callers' names
        self._mailboxes: dict[asyncio.AbstractEventLoop, Mailbox] = {}
        self._ids = itertools.count()

    def open(self, request: Request, *, name: str | None = None) -> Stream:
        """Send a request to the engine. Only the calling event loop may take the outputs; it must close the stream.

        `name`: the request's name in `abort` and `names`; default: its id.
        """
        self.link.check_alive()
        loop = asyncio.get_running_loop()
        name = request.id if name is None else name
        builder = OutputBuilder(self.preparer.tokenizer, request)
        # Engine ids are never reused, so that late updates of an earlier request are ignored.
        request = replace(request, id=f"{next(self._ids)}:{name}", prompt=None)
        with self._lock:
            if name in self._streams:
                raise RequestError("request_id", f"request {name!r} is already in flight", "use another id")
            stream = self._streams[name] = Stream(request, builder, self._mailbox(loop), name=name)
        try:
            self.link.add(stream)
        except BaseException:
            self._forget(stream)
            raise
        return stream

    def close(self, stream: Stream) -> None:
        """Abort the request if it has not ended. May be called again."""
        self._forget(stream)
        if not stream.finished:
            stream.finished = True
            with suppress(EngineError):  # the request has ended with the engine
                self.link.drop(stream)

    async def outputs(self, request: Request, *, name: str | None = None) -> AsyncGenerator[RequestOutput]:
        """Yield outputs as they arrive; those that arrive while the consumer is busy are merged. Leaving early aborts
        the request."""
        stream = self.open(request, name=name)
        try:
            while not stream.finished:
                yield await stream.next()
        finally:
            self.close(stream)

    def _forget(self, stream: Stream) -> None:
        with self._lock:
            if self._streams.get(stream.name) is stream:
                del self._streams[stream.name]

    def _mailbox(self, loop: asyncio.AbstractEventLoop) -> Mailbox:
        if loop not in self._mailboxes:
            for other in [other for other in self._mailboxes if other.is_closed()]:
                del self._mailboxes[other]
            self._mailboxes[loop] = Mailbox(loop)
        return self._mailboxes[loop]

    # --- from outside of the stream ---------------------------------------------------------------------------------

    def names(self) -> list[str]:
        """The names of the requests in flight."""
        with self._lock:
            return list(self._streams)

    def open_sequences(self) -> Counter[str]:
        """How many sequences the engine has not finished, by tenant; whether consumers took the outputs or not."""
        with self._lock:
            streams = [stream for stream in self._streams.values() if not stream.builder.finished]
        counts: Counter[str] = Counter()
        for stream in streams:
            counts[stream.request.tenant] += stream.request.params.n
        return counts

    async def abort(self, *names: str) -> int:
        """End these requests, or all; each consumer gets a last output. Returns how many were still in flight; unknown
        names are ignored."""
        with self._lock:
            chosen = (self._streams.get(name) for name in names) if names else self._streams.values()
            found = [stream for stream in chosen if stream is not None]
        for ended in [self.link.call("abort", request_id=stream.request.id) for stream in found]:
            await asyncio.wrap_future(ended)
        return len(found)

    async def call(self, name: str, /, **arguments: Any) -> Any:
        """The result of the engine's method of this name, called between two steps."""
        return await asyncio.wrap_future(self.link.call(name, **arguments))


def connect(engine: EngineProcess, config: EngineConfig) -> EngineClient:
    """The client of an engine process that has opened its model. May be called while the engine still compiles.

    Loads the tokenizer, which takes a second or more.
    """
    opened = engine.opened
    if opened is None:
        raise JaxserveError("the engine is still loading its model", "wait until it is ready")
    folder = None if opened.folder is None else Path(opened.folder)
    tokenizer = tokenizer_of(config, loads_model=True, model_folder=folder)

    def also_ends(token_ids: list[int]) -> None:
        engine.call("also_ends", token_ids=token_ids)  # runs before any request sent after it

    defaults = opened.sampling_defaults
    return EngineClient(engine, preparer_for(opened.limits, tokenizer, defaults=defaults, also_ends=also_ends))
