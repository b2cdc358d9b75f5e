# SPDX-License-Identifier: Apache-2.0
"""The engine's process: `python -m jaxserve.host.child --fd N`, where N is its end of a socket pair.

    reader  reads messages; if the parent is gone, ends the process immediately
    main    loads the model, then runs the engine: handles messages, one step, one message back; waits when idle
    beat    reports every second how long ago the last turn ended, so that the parent can detect a hang

The parent decides when the process ends: it ignores signals sent to all processes of a terminal or a service.
"""

import argparse
import faulthandler
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NoReturn

import msgspec

from jaxserve.config import EngineConfig
from jaxserve.errors import EngineError, JaxserveError
from jaxserve.exit_codes import DEBUG
from jaxserve.frontend import log_lines, wire
from jaxserve.host.driver import Driver
from jaxserve.host.outbox import Outbox
from jaxserve.types.outputs import Update
from jaxserve.types.request import Abort

if TYPE_CHECKING:  # it imports jax, see driver.py
    from jaxserve.engine.engine import Engine

BEAT = 1.0
CALL_SECONDS = 0.01  # for messages between two steps; running requests wait meanwhile
REPORT_EVERY = 0.1  # seconds between two progress messages, or between two messages with only metrics
LAST_WORDS = 2.0  # seconds for sending the last message


class Inbox:
    """Messages from the parent that have not been handled yet."""

    def __init__(self, receiver: wire.Receiver) -> None:
        self._receiver = receiver
        self._changed = threading.Condition()
        self._messages: list[Any] = []
        self.stoppable = True  # `Stop` ends the process immediately, while there is no engine to close

    def read(self) -> None:
        """The reader thread, until the process ends."""
        try:
            while (messages := self._receiver.receive()) is not None:
                if self.stoppable and any(isinstance(message, wire.Stop) for message in messages):
                    break
                with self._changed:
                    self._messages += messages
                    self._changed.notify()
        except BaseException:
            traceback.print_exc()
            _exit(1)
        _exit(0)

    def take(self, timeout: float | None) -> list[Any]:
        """Wait for messages, at most `timeout` seconds; None: without limit."""
        with self._changed:
            if not self._messages and timeout != 0:
                self._changed.wait(timeout)
            messages, self._messages = self._messages, []
        return messages


class Child:
    """The Host that runs the engine in this process."""

    def __init__(self, engine: "Engine", inbox: Inbox, outbox: Outbox) -> None:
        self._engine, self._driver, self._inbox, self._outbox = engine, Driver(engine), inbox, outbox
        self._pending: deque[Any] = deque()  # messages that have not been handled yet
        self._replies: list[Any] = []  # to the messages of this turn
        self._reported = 0.0  # when metrics were last sent
        self.turned = time.monotonic()  # when the last turn ended

    @property
    def working(self) -> bool:
        """Whether a turn should be in progress."""
        return self._engine.unfinished and not self._outbox.kept

    def run(self) -> None:
        """Until the parent sends Stop."""
        self._outbox.send(wire.Started(), wire.Turn([], self._engine.metrics()))
        self._driver.run(self)

    def calls(self, *, idle: bool) -> bool:
        self.turned = time.monotonic()
        self._pending += self._wait() if idle and not self._pending else self._inbox.take(0)
        until = time.monotonic() + CALL_SECONDS
        while self._pending:
            message = self._pending.popleft()
            if isinstance(message, wire.Stop):
                return False
            self._handle(message)
            if time.monotonic() >= until:
                break
        return True

    def _wait(self) -> list[Any]:
        """For messages, or for one more program that was compiled, to report it."""
        while not (messages := self._inbox.take(self._patience)):
            self._outbox.flush()
            if self._engine.compiling:
                self._engine.adopt()
                break
        self.turned = time.monotonic()
        return messages

    @property
    def _patience(self) -> float | None:
        return REPORT_EVERY if self._outbox.kept or self._engine.compiling else None

    def take(self, updates: list[Update]) -> Iterable[Abort]:
        """Send the updates. Returns no aborts: the parent, which has the text, sends them as messages."""
        engine, outbox, now = self._engine, self._outbox, time.monotonic()
        replies, self._replies = self._replies, []
        if updates or replies or now - self._reported > REPORT_EVERY or not engine.unfinished:
            outbox.send(*replies, wire.Turn(updates, engine.metrics()))
            self._reported = now
        elif outbox.kept:
            outbox.flush()
        outbox.wait()
        return ()

    def _handle(self, message: Any) -> None:
        match message:
            case wire.Add():
                try:
                    self._driver.add(wire.request_of(message))
                except Exception as error:
                    self._replies.append(wire.Refused(message.request_id, wire.fault_of(error)))
            case Abort():
                self._engine.abort(message.request_id, index=message.index, reason=message.reason)
            case wire.Call():
                self._replies.append(self._called(message))
            case _:
                raise TypeError(f"unexpected {type(message).__name__} while the engine is running")

    def _called(self, call: wire.Call) -> wire.Returned:
        try:
            wire.check_call(call.name)
            result = getattr(self._engine, call.name)(**call.arguments)
            return wire.Returned(call.number, msgspec.Raw(wire.encode(result)))
        except Exception as error:
            if not isinstance(error, JaxserveError):
                traceback.print_exc()
            return wire.Returned(call.number, fault=wire.fault_of(error))


class Heartbeat:
    """Sends heartbeats. If Python itself hangs, none are sent; after a timeout the stacks are printed and the process
    ends, since nothing else would end it if the parent were gone too."""

    def __init__(self, outbox: Outbox, watchdog: float | None) -> None:
        self._outbox, self._watchdog = outbox, watchdog
        self.of: Child | None = None
        threading.Thread(target=self._run, name="jaxserve-beat", daemon=True).start()

    def _run(self) -> None:
        while True:
            if self._watchdog is not None:
                faulthandler.dump_traceback_later(self._watchdog + 10 * BEAT, exit=True)
            self._outbox.flush()
            if not self._outbox.kept:
                child, now = self.of, time.monotonic()
                age, working = (0.0, False) if child is None else (now - child.turned, child.working)
                self._outbox.send(wire.Beat(age, working))
            time.sleep(BEAT)


def _model_opened(engine: "Engine") -> wire.ModelOpened:
    import jax

    spec, leaves = engine.model.spec, jax.tree.leaves(engine.model.shapes)
    folder = engine.model.folder
    return wire.ModelOpened(
        folder=None if folder is None else str(folder),
        limits=engine.limits,
        sampling_defaults=dict(engine.model.sampling_defaults),
        family=spec.family,
        layers=len(spec.layers),
        dtype=leaves[0].dtype.name,
        parameters=sum(leaf.size for leaf in leaves),
        weight_bytes=engine.capacity.memory.weights,
    )


def _load(start: wire.Start, outbox: Outbox) -> "Engine":
    config = EngineConfig(**start.config)
    outbox.send(wire.Progress("starting", 0, 0))
    from jaxserve.engine.engine import Engine  # with jax: seconds

    last = 0.0

    def on_progress(what: str, done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last > REPORT_EVERY or done >= total:
            last = time.monotonic()
            outbox.send(wire.Progress(what, done, total))

    outbox.send(wire.Progress("opening the model", 0, 0))
    return Engine(config, on_progress=on_progress, opened=lambda engine: outbox.send(_model_opened(engine)))


def _is_fault_of_ours(error: BaseException) -> bool:
    """Whether to print its traceback. One line is enough for an error that the user can fix."""
    cause = error.__cause__ if isinstance(error, EngineError) and error.__cause__ is not None else error
    return not isinstance(cause, JaxserveError)


def serve(end: socket.socket) -> int:
    """Run until the parent sends Stop; return the exit code."""
    receiver = wire.Receiver(end, of_parent=True)
    first = receiver.receive()
    if first is None:
        return 0
    [start] = first
    inbox, outbox = Inbox(receiver), Outbox(end)
    threading.Thread(target=inbox.read, name="jaxserve-reader", daemon=True).start()
    beat = Heartbeat(outbox, start.watchdog)
    try:
        engine = _load(start, outbox)
        inbox.stoppable = False
        beat.of = child = Child(engine, inbox, outbox)
        child.run()
    except BaseException as error:
        if _is_fault_of_ours(error) or os.environ.get(DEBUG):
            traceback.print_exc()
        outbox.send(wire.Failed(wire.fault_of(error)))
        outbox.finish(LAST_WORDS)
        return 1
    return 0  # the system frees all memory, including the devices'


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT, signal.SIGTERM))
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1)  # the parent sends it to a hung process, to print the stacks
    parser = argparse.ArgumentParser(prog="jaxserve.host.child")
    parser.add_argument("--fd", type=int, required=True)
    parser.add_argument("--json-log", action="store_true", help="write JSON to standard error")
    given = parser.parse_args(arguments)
    if given.json_log:
        log_lines.write_json()
    number = given.fd
    os.set_inheritable(number, False)
    _exit(serve(socket.socket(fileno=number)))


def _exit(code: int) -> NoReturn:
    """Exit without waiting for threads of jax or of a compiler."""
    with suppress(OSError, ValueError):
        sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
