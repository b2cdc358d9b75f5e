# SPDX-License-Identifier: Apache-2.0
"""Runs an engine in a child process, for a parent that does not import jax: starts, watches and ends it.

    callers --- Add, Abort, Call ---> sender --- all pending messages, in one frame ---> child
    streams, calls, `on_change` <--- receiver <--- one frame per turn --- child

Only `stop` waits for the child. However it ends (a fault, a signal, a hang that the watchdog detects), its streams and
calls immediately end with an EngineError, and it is reaped. It cannot be restarted; create a new EngineProcess instead.
"""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import msgspec

from jaxserve.config import EngineConfig
from jaxserve.errors import EngineError, JaxserveError
from jaxserve.frontend import wire
from jaxserve.frontend.streams import Stream, Streams, again
from jaxserve.types.metrics import EngineMetrics
from jaxserve.types.request import Abort

type Phase = Literal["starting", "ready", "failed", "stopped"]

START_SECONDS = 60.0  # the shortest timeout during the start, when imports from a slow disk can delay heartbeats
# Huge pages for the child's malloc, unless the environment sets this variable. On a CPU the demo makes 9 to 10 % more
# tokens per second at 1 and 32 streams, a 110M model up to 2 %, and programs load half a second faster.
MALLOC = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
EXIT_SECONDS = 0.5  # for a child that closed its end to exit
DUMP_SECONDS = 0.5  # for a hanging child to print its stacks


@dataclass(frozen=True, slots=True)
class EngineState:
    phase: Phase = "starting"
    detail: str = "starting"  # current activity: "loading 35 %", "compiling 7/18"; empty if there is none
    done: int = 0
    total: int = 0
    error: str | None = None  # if it failed: the fault and the remedy
    what: str = field(default="", compare=False)  # the kind of activity
    since: float = field(default=0.0, compare=False)  # when that began


class EngineProcess:
    """An EngineLink. Can be started once."""

    def __init__(
        self,
        config: EngineConfig,
        *,
        watchdog: float | None = 300.0,
        command: Sequence[str] | None = None,
        json_log: bool = False,
        on_change: Callable[[EngineState], object] | None = None,
    ) -> None:
        """
        watchdog: seconds without a completed turn while there is work, or without a heartbeat, that count as a hang.
        json_log: the child writes JSON to standard error.
        on_change: called with each new state, in order, from any thread; it must not block.
        """
        self.state = EngineState()
        self.stats: EngineMetrics | None = None  # as of the last turn
        self.opened: wire.ModelOpened | None = None  # once the model is opened
        self._config, self._watchdog, self._on_change = config, watchdog, on_change
        self._command = [*(command or _command()), *["--json-log"] * json_log]
        self._process: subprocess.Popen[bytes] | None = None
        self._threads: list[threading.Thread] = []
        self._streams = Streams()
        self._changed = threading.Condition()  # guards the next four
        self._outgoing: list[msgspec.Raw] = []
        self._calls: dict[int, tuple[str, Future[Any]]] = {}
        self._numbers = 0
        self._stopping = False
        self._reporting = threading.RLock()  # guards the state
        self._ended = threading.Event()
        self._heard = 0.0  # when the last message arrived
        self._beat = wire.Beat(0.0, False)

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    def start(self) -> None:
        """Start the child without waiting for it; `state` and `on_change` report progress."""
        mine, its = socket.socketpair()
        with its:
            # The child ignores signals to the process group. Block them until it has set that up.
            blocked = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
            try:
                self._process = subprocess.Popen(
                    [*self._command, "--fd", str(its.fileno())],
                    pass_fds=(its.fileno(),),
                    stdin=subprocess.DEVNULL,
                    env=MALLOC | os.environ,
                )
            except BaseException:
                mine.close()
                raise
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        self._heard = time.monotonic()
        with suppress(OSError):  # the child has already ended; the receiver detects this
            mine.sendall(wire.frame([wire.Start(asdict(self._config), self._watchdog)]))
        sender = threading.Thread(target=self._send, args=(mine,), name="jaxserve-sender", daemon=True)
        receiver = threading.Thread(
            target=self._receive, args=(mine, self._process, sender), name="jaxserve-receiver", daemon=True
        )
        self._threads = [sender, receiver]
        if self._watchdog is not None:
            work = self._watch, (self._process, self._watchdog)
            self._threads.append(threading.Thread(target=work[0], args=work[1], name="jaxserve-watchdog", daemon=True))
        for thread in self._threads:
            thread.start()

    def stop(self, grace: float = 5.0) -> None:
        """End the child and wait for it; kill it after `grace` seconds. Streams end immediately."""
        error = EngineError("the engine was shut down", "restart it")
        with self._changed:
            self._stopping = True
        self._fail_all(error)
        self._post(wire.encode(wire.Stop()))
        if self._process is not None:
            try:
                self._process.wait(grace)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._end("stopped", error)
        for thread in self._threads:
            thread.join()

    # --- an EngineLink ----------------------------------------------------------------------------------------------

    def check_alive(self) -> None:
        self._streams.check_alive()

    def add(self, stream: Stream) -> None:
        data = wire.add_of(stream.request)
        self._streams.add(stream)
        self._post(data)

    def drop(self, stream: Stream) -> None:
        if self._streams.remove(stream):
            self._post(wire.encode(Abort(stream.request.id)))

    def call(self, name: str, /, **arguments: Any) -> Future[Any]:
        """Call the engine's method of this name, one of wire.CALLS, between two steps."""
        wire.check_call(name)
        future: Future[Any] = Future()
        with self._changed:
            self._numbers += 1
            number = self._numbers
        data = wire.encode(wire.Call(number, name, arguments))
        with self._changed:
            self.check_alive()
            self._calls[number] = name, future
        self._post(data)
        return future

    def _post(self, data: bytes) -> None:
        with self._changed:
            self._outgoing.append(msgspec.Raw(data))
            self._changed.notify()

    # --- the sender -------------------------------------------------------------------------------------------------

    def _send(self, end: socket.socket) -> None:
        while True:
            with self._changed:
                while not self._outgoing and not self._ended.is_set():
                    self._changed.wait()
                if self._ended.is_set():
                    return
                outgoing, self._outgoing = self._outgoing, []
            try:
                end.sendall(wire.frame(outgoing))
            except OSError:  # the child has ended; the receiver detects this
                return

    # --- the receiver -----------------------------------------------------------------------------------------------

    def _receive(self, end: socket.socket, process: "subprocess.Popen[bytes]", sender: threading.Thread) -> None:
        receiver = wire.Receiver(end, of_parent=False)
        try:
            while (messages := receiver.receive()) is not None:
                self._heard = time.monotonic()
                for message in messages:
                    self._take(message)
        except Exception as fault:
            error = EngineError(
                f"reading from the engine failed: {type(fault).__name__}: {fault}", "please report this bug"
            )
            self._end("failed", error)
            process.kill()
        try:
            code = process.wait(EXIT_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            code = process.wait()
        if not self._stopping:  # otherwise `stop` sets the state
            self._end("failed", _ended_with(code))
        sender.join()
        receiver.close()
        end.close()

    def _take(self, message: Any) -> None:
        match message:
            case wire.Turn():
                self.stats = message.metrics
                for abort in self._streams.take(message.updates):
                    self._post(wire.encode(abort))
            case wire.Refused():
                self._streams.fail(message.request_id, wire.error_of(message.fault))
            case wire.Returned():
                self._return(message)
            case wire.Beat():
                self._beat = message
            case wire.Progress():
                what, last = message.what, self.state
                since = last.since if last.what == what else self._heard
                self._become(
                    EngineState("starting", _detail(message), message.done, message.total, what=what, since=since)
                )
            case wire.ModelOpened():
                self.opened = message
                self._become(self.state)
            case wire.Started():
                self._become(EngineState("ready", ""))
            case _:
                self._end("failed", EngineError(message.fault.problem, message.fault.hint))

    def _return(self, returned: wire.Returned) -> None:
        with self._changed:
            call = self._calls.pop(returned.number, None)
        if call is None:  # `stop` has ended it
            return
        name, future = call
        if not future.set_running_or_notify_cancel():
            return
        try:
            result = wire.result_of(name, returned)
        except JaxserveError as error:
            future.set_exception(error)
        else:
            future.set_result(result)

    # --- the watchdog -----------------------------------------------------------------------------------------------

    def _watch(self, process: "subprocess.Popen[bytes]", seconds: float) -> None:
        every = min(1.0, seconds / 4)
        last = time.monotonic()
        while not self._ended.wait(every):
            now = time.monotonic()
            if now - last > every + 1:  # this process itself was suspended, so it has not read what arrived meanwhile
                self._heard = now
            last = now
            patience = seconds if self.state.phase == "ready" else max(seconds, START_SECONDS)
            if self._beat.working and self._beat.age > seconds:
                problem = f"the engine completed no step for {self._beat.age:.0f} seconds"
            elif now - self._heard > patience:
                problem = f"the engine sent no heartbeat for {now - self._heard:.0f} seconds"
            else:
                continue
            with suppress(ProcessLookupError):
                process.send_signal(signal.SIGUSR1)
            time.sleep(DUMP_SECONDS)  # let it print before the failure is reported, which kills it
            self._end("failed", EngineError(problem, "see its log for where it hangs"))
            process.kill()

    # --- states and the end -----------------------------------------------------------------------------------------

    def _become(self, state: EngineState) -> None:
        with self._reporting:
            if not self._ended.is_set():
                self._set(state)

    def _set(self, state: EngineState) -> None:
        self.state = state
        if self._on_change is not None:
            self._on_change(state)

    def _end(self, phase: Literal["failed", "stopped"], error: EngineError) -> None:
        """Set the final state. Only the first call has an effect."""
        with self._reporting:
            if self._ended.is_set():
                return
            with self._changed:
                self._ended.set()
                self._changed.notify_all()
            reason = str(error) if phase == "failed" else None
            try:  # set the state first: the consumer of a stream that ends must find the new one
                self._set(replace(self.state, phase=phase, detail="", error=reason))
            finally:
                self._fail_all(error)

    def _fail_all(self, error: EngineError) -> None:
        self._streams.close(error)  # no more requests are accepted
        with self._changed:
            calls, self._calls = list(self._calls.values()), {}
        for _, future in calls:
            if future.set_running_or_notify_cancel():
                future.set_exception(again(error))


def _command() -> list[str]:
    """Run this Python interpreter with the same -O, without modules from the current folder."""
    return [sys.executable, *["-O"] * sys.flags.optimize, "-P", "-m", "jaxserve.host.child"]


def _detail(progress: wire.Progress) -> str:
    if not progress.total:
        return progress.what
    if progress.what == "loading":  # bytes
        return f"loading {100 * progress.done // progress.total} %"
    return f"{progress.what} {progress.done}/{progress.total}"


def _ended_with(code: int) -> EngineError:
    if code >= 0:
        return EngineError(f"the engine process ended with exit code {code}", "see its log")
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    hint = "the machine may have run out of memory: see its log" if code == -signal.SIGKILL else "see its log"
    return EngineError(f"the engine process was killed by {name}", hint)
