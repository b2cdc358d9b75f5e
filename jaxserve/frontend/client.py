# SPDX-License-Identifier: Apache-2.0
"""The callers of an engine, in any number of event loops. The engine may be in a thread here or in another process.

AsyncLLM and the server stand on this. It makes a stream of each checked request, and sees to it that a request whose
consumer left is aborted.
"""

import asyncio
import itertools
import threading
from collections.abc import AsyncGenerator
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import replace
from typing import Any, Protocol

from jaxserve.errors import EngineError, RequestError
from jaxserve.frontend.outputs import OutputBuilder
from jaxserve.frontend.prepare import Intake, Ready
from jaxserve.frontend.streams import Mailbox, Stream
from jaxserve.types.outputs import RequestOutput


class EngineLink(Protocol):
    """The way to an engine. Any thread may call; nothing here waits for the engine."""

    def check_alive(self) -> None:
        """Raises the EngineError that it ended with."""
        ...

    def add(self, stream: Stream) -> None:
        """Its outputs come to the stream; so does the error, if the engine refuses the request."""
        ...

    def drop(self, stream: Stream) -> None:
        """Its consumer has left. An engine that has ended is told nothing."""
        ...

    def call(self, name: str, /, **arguments: Any) -> Future[Any]:
        """Has the engine's method of this name called between two steps."""
        ...


class Front:
    def __init__(self, link: EngineLink, intake: Intake) -> None:
        self.link, self.intake = link, intake
        self._lock = threading.Lock()
        self._streams: dict[str, Stream] = {}  # by the callers' names, those that are not finished
        self._mailboxes: dict[asyncio.AbstractEventLoop, Mailbox] = {}
        self._ids = itertools.count()

    def open(self, job: Ready, *, name: str | None = None) -> Stream:
        """Hands a request to the engine, in an event loop, which alone may take the outputs. Who opens a stream closes
        it. `name`: what `abort` and `names` know it by; its request's id if not given."""
        self.link.check_alive()
        loop = asyncio.get_running_loop()
        name = job.request.id if name is None else name
        builder = OutputBuilder(self.intake.tokenizer, job.request, prompt=job.prompt)
        # The engine's id is never used twice: what it still says of an earlier request reaches nobody.
        request = replace(job.request, id=f"{next(self._ids)}:{name}")
        with self._lock:
            if name in self._streams:
                raise RequestError("request_id", f"a request {name!r} is in flight", "give another id")
            stream = self._streams[name] = Stream(request, builder, self._mailbox(loop), name=name)
        try:
            self.link.add(stream)
        except BaseException:
            self._forget(stream)
            raise
        return stream

    def close(self, stream: Stream) -> None:
        """Its consumer wants no more; the engine ends the request if it goes on still. May be called again."""
        self._forget(stream)
        if not stream.finished:
            stream.finished = True
            with suppress(EngineError):  # then it has ended with the engine
                self.link.drop(stream)

    async def outputs(self, job: Ready, *, name: str | None = None) -> AsyncGenerator[RequestOutput]:
        """As they come; what came while the consumer was busy comes as one. Leaving early aborts the request."""
        stream = self.open(job, name=name)
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
        """Of the requests in flight."""
        with self._lock:
            return list(self._streams)

    async def abort(self, *names: str) -> int:
        """Ends these requests, or all; each consumer gets a last output. How many there were: unknown ones have
        ended."""
        with self._lock:
            chosen = (self._streams.get(name) for name in names) if names else self._streams.values()
            found = [stream for stream in chosen if stream is not None]
        for ended in [self.link.call("abort", request_id=stream.request.id) for stream in found]:
            await asyncio.wrap_future(ended)
        return len(found)

    async def call(self, name: str, /, **arguments: Any) -> Any:
        """What the engine's method of this name gives, called between two steps."""
        return await asyncio.wrap_future(self.link.call(name, **arguments))
