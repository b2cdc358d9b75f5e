# SPDX-License-Identifier: Apache-2.0
"""An engine in a thread, for callers in this process.

    caller --- calls, run between steps ---> thread --- one delivery per step and event loop ---> Streams

Only the thread uses the engine. It waits while there is nothing to do. When it ends, by a fault or by `stop`, every
stream and every waiting call ends with an EngineError, and new ones are rejected.
"""

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from typing import Any

from jaxserve.engine.engine import Engine
from jaxserve.errors import EngineError
from jaxserve.frontend.streams import Stream, Streams, again
from jaxserve.host.driver import Driver
from jaxserve.types.outputs import Update
from jaxserve.types.request import Abort

ADOPT_EVERY = 0.1  # seconds between two looks for compiled programs while the engine is idle


class EngineThread:
    """An EngineLink, and the Host that runs the engine."""

    def __init__(self, engine: Engine) -> None:
        self._engine, self._driver = engine, Driver(engine)
        self._streams = Streams()
        self._changed = threading.Condition()
        self._calls: list[tuple[Callable[[], Any], Future[Any]]] = []
        self._stopping = False
        self._error: EngineError | None = None
        self._thread = threading.Thread(target=self._run, name="jaxserve-engine", daemon=True)
        self._thread.start()

    # --- from any thread --------------------------------------------------------------------------------------------

    def check_alive(self) -> None:
        if self._error is not None:
            raise again(self._error)

    def add(self, stream: Stream) -> None:
        self._streams.add(stream)
        self.call(lambda: self._add(stream))

    def drop(self, stream: Stream) -> None:
        if self._streams.remove(stream):
            with suppress(EngineError):  # the request has ended with the engine
                self.call("abort", request_id=stream.request.id)

    def call(self, what: str | Callable[[], Any], /, **arguments: Any) -> Future[Any]:
        """Call the engine's method of this name, or a function, between two steps."""
        function = partial(getattr(self._engine, what), **arguments) if isinstance(what, str) else what
        future: Future[Any] = Future()
        with self._changed:
            self.check_alive()
            self._calls.append((function, future))
            self._changed.notify()
        return future

    def stop(self) -> None:
        """End the thread and wait for it."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    # --- the engine's thread ----------------------------------------------------------------------------------------

    def _run(self) -> None:
        error = EngineError("the engine was shut down", "create a new one")
        try:
            self._driver.run(self)
        except EngineError as fault:
            error = fault
        except BaseException as fault:
            error = EngineError(f"the engine's thread failed: {type(fault).__name__}: {fault}", "restart it")
        self._close(error)

    def calls(self, *, idle: bool) -> bool:
        with self._changed:
            while idle and not (self._calls or self._stopping):
                self._changed.wait(ADOPT_EVERY if self._engine.compiling else None)
                if self._engine.compiling:
                    break
            if self._stopping:
                return False
            calls, self._calls = self._calls, []
        if idle:
            self._engine.adopt()
        for function, future in calls:
            _answer(function, future)
        return True

    def take(self, updates: list[Update]) -> Iterable[Abort]:
        return self._streams.take(updates) if updates else ()

    def _add(self, stream: Stream) -> None:
        try:
            self._driver.add(stream.request)
        except Exception as error:
            self._streams.fail(stream.request.id, error)

    def _close(self, error: EngineError) -> None:
        with self._changed:
            self._error = error
            calls, self._calls = self._calls, []
        for _, future in calls:
            _answer(partial(_refuse, error), future)
        self._streams.close(error)
        self._engine.close()


def _answer(function: Callable[[], Any], future: Future[Any]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        result = function()
    except Exception as error:
        future.set_exception(error)
    else:
        future.set_result(result)


def _refuse(error: EngineError) -> None:
    raise again(error)
