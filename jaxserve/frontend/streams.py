# SPDX-License-Identifier: Apache-2.0
"""Delivers an engine's updates to consumers in event loops, from any thread.

    updates --- one thread ---> Streams: outputs with their text --- at most one wake-up per loop ---> Mailbox -> Stream

Independent of where the engine runs. Outputs that a slow consumer has not taken are merged into one.
"""

import asyncio
import threading
import time
from collections.abc import Callable, Iterable

from jaxserve.errors import EngineError
from jaxserve.frontend.outputs import OutputBuilder
from jaxserve.types.outputs import RequestOutput, Update
from jaxserve.types.request import Abort, Request
from jaxserve.types.sampling_params import RequestOutputKind

type News = list[tuple["Stream", RequestOutput | Exception]]


class Mailbox:
    """Wakes the consumers of one event loop, with at most one pending callback."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.lock = threading.Lock()
        self._loop = loop
        self._ready: list[Stream] = []
        self._called = False

    def post(self, news: News) -> bool:
        """Deliver outputs, from any thread. False if the event loop is closed."""
        with self.lock:
            for stream, item in news:
                stream.put(item)
                self._ready.append(stream)
            if self._called:
                return True
            self._called = True
        try:
            self._loop.call_soon_threadsafe(self._deliver)
        except RuntimeError:
            return False
        return True

    def _deliver(self) -> None:
        with self.lock:
            ready, self._ready, self._called = self._ready, [], False
        for stream in ready:
            stream.on_wake()


class Stream:
    """The outputs of one request: built in the thread where its updates arrive, taken in its consumer's event loop.

    Times are on the monotonic clock; None: not yet.
    """

    def __init__(self, request: Request, builder: OutputBuilder, mailbox: Mailbox, *, name: str) -> None:
        self.request, self.builder, self.mailbox, self.name = request, builder, mailbox, name
        self.finished = False  # the consumer has received the last output or the error
        self.arrival = request.arrival
        self.scheduled: float | None = None  # when it first got a row
        self.first_output: float | None = None  # when its first token arrived here
        self.last_output: float | None = None  # when its latest token arrived
        self._merges = request.params.output_kind is RequestOutputKind.DELTA
        self._waiting: RequestOutput | None = None
        self._error: Exception | None = None
        self._event = asyncio.Event()
        self.on_wake: Callable[[], object] = self._event.set  # called in the consumer's loop when there is news

    def note(self, update: Update, now: float) -> None:
        """Record the times."""
        if self.scheduled is None:
            self.scheduled = update.scheduled
        if update.token_ids:
            self.last_output = now
            if self.first_output is None:
                self.first_output = now

    def put(self, item: RequestOutput | Exception) -> None:
        """The caller holds the mailbox's lock."""
        if isinstance(item, Exception):
            self._error = item
        elif self._merges and self._waiting is not None:
            _merge(self._waiting, item)
        else:
            self._waiting = item

    def take(self) -> RequestOutput | None:
        """What arrived since the last call, if anything. Raises the error that the request ended with."""
        with self.mailbox.lock:
            output, self._waiting = self._waiting, None
        if output is not None:
            self.finished = output.finished
        elif self._error is not None:
            self.finished = True
            raise self._error
        return output

    async def next(self) -> RequestOutput:
        while True:
            self._event.clear()
            output = self.take()
            if output is not None:
                return output
            await self._event.wait()


def _merge(into: RequestOutput, later: RequestOutput) -> None:
    """Append a DELTA output to another that has not been taken yet."""
    for sample in later.outputs:
        before = next((other for other in into.outputs if other.index == sample.index), None)
        if before is None:
            into.outputs.append(sample)
            continue
        before.text += sample.text
        before.token_ids += sample.token_ids
        if before.logprobs is not None and sample.logprobs is not None:
            before.logprobs += sample.logprobs
        before.cumulative_logprob, before.policy_version = sample.cumulative_logprob, sample.policy_version
        before.finish_reason, before.stop_reason = sample.finish_reason, sample.stop_reason
        before.error = sample.error
    if into.prompt_logprobs is not None and later.prompt_logprobs:
        into.prompt_logprobs = into.prompt_logprobs + later.prompt_logprobs
    if later.embedding is not None:
        into.embedding = later.embedding
    into.finished, into.num_cached_tokens = later.finished, later.num_cached_tokens


class Streams:
    """The streams of an engine's requests, by the engine's ids. Thread-safe, but only one thread may call `take`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: dict[str, Stream] = {}
        self._error: EngineError | None = None

    def __len__(self) -> int:
        return len(self._open)

    def check_alive(self) -> None:
        if self._error is not None:
            raise again(self._error)

    def add(self, stream: Stream) -> None:
        with self._lock:
            self.check_alive()
            self._open[stream.request.id] = stream

    def remove(self, stream: Stream) -> bool:
        """Stop delivering to a stream. False if its request has already ended."""
        with self._lock:
            return self._open.pop(stream.request.id, None) is not None

    def fail(self, request_id: str, error: Exception) -> None:
        """End a stream with this error."""
        with self._lock:
            stream = self._open.pop(request_id, None)
        if stream is not None:
            stream.mailbox.post([(stream, error)])

    def take(self, updates: Iterable[Update]) -> list[Abort]:
        """Deliver updates to consumers. Returns what the engine must end early: samples that reached a stop string, and
        requests with a fault in their text or a closed event loop."""
        now = time.monotonic()
        aborts: list[Abort] = []
        news: dict[Mailbox, News] = {}
        for update in updates:
            stream = self._open.get(update.request_id)
            if stream is None:
                continue
            stream.note(update, now)
            item = _output(stream, update, aborts)
            if item is None:
                continue
            news.setdefault(stream.mailbox, []).append((stream, item))
            if isinstance(item, Exception) or item.finished:
                self.remove(stream)
        for mailbox, items in news.items():
            if not mailbox.post(items):
                aborts += self._deserted(mailbox)
        return aborts

    def _deserted(self, mailbox: Mailbox) -> list[Abort]:
        with self._lock:
            ids = [name for name, stream in self._open.items() if stream.mailbox is mailbox]
            for name in ids:
                del self._open[name]
        return [Abort(name) for name in ids]

    def close(self, error: EngineError) -> None:
        """End every stream with this error, and reject later ones. Each gets a separate copy of the error."""
        with self._lock:
            if self._error is None:
                self._error = error
            streams, self._open = list(self._open.values()), {}
        news: dict[Mailbox, News] = {}
        for stream in streams:
            news.setdefault(stream.mailbox, []).append((stream, again(error)))
        for mailbox, items in news.items():
            mailbox.post(items)


def _output(stream: Stream, update: Update, aborts: list[Abort]) -> RequestOutput | Exception | None:
    try:
        output = stream.builder.add(update)
    except Exception as fault:  # a fault in this request's text; the other requests continue
        aborts.append(Abort(update.request_id))
        return EngineError(f"the output failed: {type(fault).__name__}: {fault}", "please report this bug")
    aborts += stream.builder.take_aborts(update.request_id)
    return output


def again(error: EngineError) -> EngineError:
    """A copy for another receiver: a traceback grows with every raise."""
    return EngineError(error.problem, error.hint)
