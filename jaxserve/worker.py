# SPDX-License-Identifier: Apache-2.0
"""An engine in a thread of its own, and the way of its outputs to consumers in event loops.

    caller --- calls, done between steps ---> thread --- one hand-over per step and loop ---> Mailbox -> Streams

The thread alone touches the engine. It sleeps while there is nothing to do. When it ends, by a fault or because it is
told to, every stream and every call that waits ends with an EngineError, and new ones are refused.
"""

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

from jaxserve.engine.engine import Engine
from jaxserve.engine.outputs import OutputBuilder
from jaxserve.errors import EngineError
from jaxserve.types import Request, RequestOutput, RequestOutputKind, Update


class Mailbox:
    """Wakes the consumers of one event loop. Never more than one call of the loop is under way."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.lock = threading.Lock()
        self._loop = loop
        self._ready: list[Stream] = []
        self._called = False

    def post(self, news: "list[tuple[Stream, RequestOutput | Exception]]") -> bool:
        """From another thread. False where the loop is closed: nobody listens any more."""
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
            stream.wake()


class Stream:
    """The outputs of one request: made in the engine's thread, taken in its consumer's event loop."""

    def __init__(self, request: Request, builder: OutputBuilder, mailbox: Mailbox, *, name: str) -> None:
        self.request, self.builder, self.mailbox, self.name = request, builder, mailbox, name
        self.finished = False  # the consumer has had the last output, or the error
        self._merges = request.params.output_kind is RequestOutputKind.DELTA
        self._waiting: RequestOutput | None = None
        self._error: Exception | None = None
        self._event = asyncio.Event()

    def put(self, item: RequestOutput | Exception) -> None:
        """With the mailbox's lock."""
        if isinstance(item, Exception):
            self._error = item
        elif self._merges and self._waiting is not None:
            _merge(self._waiting, item)
        else:
            self._waiting = item

    def wake(self) -> None:
        self._event.set()

    async def next(self) -> RequestOutput:
        while True:
            self._event.clear()
            with self.mailbox.lock:
                output, self._waiting = self._waiting, None
            if output is not None:
                self.finished = output.finished
                return output
            if self._error is not None:
                self.finished = True
                raise self._error
            await self._event.wait()


def _merge(into: RequestOutput, later: RequestOutput) -> None:
    """Adds one DELTA to another that nobody has seen yet."""
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
    into.finished, into.num_cached_tokens = later.finished, later.num_cached_tokens


class Worker:
    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._streams: dict[str, Stream] = {}  # of the engine's thread alone
        self._changed = threading.Condition()
        self._calls: list[tuple[Callable[[], Any], Future[Any] | Stream]] = []
        self._stopping = False
        self._error: EngineError | None = None
        self._thread = threading.Thread(target=self._run, name="jaxserve-engine", daemon=True)
        self._thread.start()

    # --- from any thread --------------------------------------------------------------------------------------------

    def check_alive(self) -> None:
        if self._error is not None:
            raise _again(self._error)

    def add(self, stream: Stream) -> None:
        """Its outputs come to the stream; so does the error, if the engine refuses the request."""
        self._post(lambda: self._add(stream), stream)

    def drop(self, stream: Stream) -> None:
        """Its consumer has left."""
        with suppress(EngineError):  # then it has ended with the engine
            self._post(lambda: self._abort(stream), Future[None]())

    def call[T](self, function: Callable[[], T]) -> "Future[T]":
        future: Future[T] = Future()
        self._post(function, future)
        return future

    def _post(self, function: Callable[[], Any], answer: "Future[Any] | Stream") -> None:
        with self._changed:
            self.check_alive()
            self._calls.append((function, answer))
            self._changed.notify()

    def stop(self) -> None:
        """Returns when the thread has ended."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    # --- the engine's thread ----------------------------------------------------------------------------------------

    def _run(self) -> None:
        error = EngineError("the engine was shut down", "make another")
        try:
            while self._turn():
                pass
        except EngineError as fault:
            error = fault
        except BaseException as fault:
            error = EngineError(f"the engine's thread failed: {type(fault).__name__}: {fault}", "start it again")
        self._close(error)

    def _turn(self) -> bool:
        engine = self._engine
        with self._changed:
            while not (self._calls or self._stopping or engine.unfinished):
                self._changed.wait()
            if self._stopping:
                return False
            calls, self._calls = self._calls, []
        for function, answer in calls:
            _answer(function, answer)
        if engine.unfinished:
            self._hand_over(engine.step())
        return True

    def _add(self, stream: Stream) -> None:
        self._engine.add(stream.request)
        self._streams[stream.request.id] = stream

    def _abort(self, stream: Stream) -> None:
        self._streams.pop(stream.request.id, None)
        self._engine.abort(stream.request.id)

    def _hand_over(self, updates: list[Update]) -> None:
        news: dict[Mailbox, list[tuple[Stream, RequestOutput | Exception]]] = {}
        for update in updates:
            stream = self._streams.get(update.request_id)
            if stream is None:
                continue
            item = self._output(stream, update)
            if item is not None:
                news.setdefault(stream.mailbox, []).append((stream, item))
            if stream.builder.finished or isinstance(item, Exception):
                del self._streams[update.request_id]
        for mailbox, items in news.items():
            if not mailbox.post(items):
                for stream in [stream for stream in self._streams.values() if stream.mailbox is mailbox]:
                    self._abort(stream)

    def _output(self, stream: Stream, update: Update) -> RequestOutput | Exception | None:
        try:
            output = stream.builder.add(update)
        except Exception as fault:  # of this request's text; the others go on
            self._engine.abort(update.request_id)
            return EngineError(f"the output failed: {type(fault).__name__}: {fault}", "report this")
        for index in stream.builder.take_stopped():
            self._engine.abort(update.request_id, index=index, reason="stop")
        return output

    def _close(self, error: EngineError) -> None:
        with self._changed:
            self._error = error
            calls, self._calls = self._calls, []
        for _, answer in calls:
            _fail(answer, error)
        for stream in self._streams.values():
            _fail(stream, error)
        self._streams = {}
        self._engine.close()


def _answer(function: Callable[[], Any], answer: "Future[Any] | Stream") -> None:
    if isinstance(answer, Future) and not answer.set_running_or_notify_cancel():
        return
    try:
        result = function()
    except Exception as error:
        if isinstance(answer, Stream):
            answer.mailbox.post([(answer, error)])
        else:
            answer.set_exception(error)
    else:
        if isinstance(answer, Future):
            answer.set_result(result)


def _fail(answer: "Future[Any] | Stream", error: EngineError) -> None:
    def refuse() -> None:
        raise _again(error)

    _answer(refuse, answer)


def _again(error: EngineError) -> EngineError:
    """For each who is told one of his own: a traceback grows with every raise."""
    return EngineError(error.problem, error.hint)
