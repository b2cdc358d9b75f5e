# SPDX-License-Identifier: Apache-2.0
"""Compiles the remaining programs while the engine serves requests: one after another, at low priority.

The engine takes finished ones from `ready`, between two steps. If a program cannot be compiled, this is logged once,
and steps go on with a larger one. The thread ends with the last program, after `stop`, or with the main thread; an exit
of the process waits for the program that is being compiled, since a compiler cannot be interrupted.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

from jaxserve.engine.execute import compiler, program_store
from jaxserve.engine.execute.compiler import Where
from jaxserve.engine.execute.program_store import Store
from jaxserve.engine.execute.programs import Program

PAUSE = 0.2  # seconds between two looks at whether the process ends


class Background[Key]:
    def __init__(
        self,
        programs: Sequence[tuple[Key, Program]],
        *,
        where: Where,
        store: Store | None,
        report: Callable[[str], None],
    ) -> None:
        self.ready: deque[tuple[Key, object]] = deque()
        self.remaining = len(programs)
        self._programs, self._where, self._store, self._report = programs, where, store, report
        self._stopped, self._go = threading.Event(), threading.Event()
        # Not a daemon: if the interpreter ended while the thread is inside a compiler, the process would abort.
        self._thread = threading.Thread(target=self._run, name="jaxserve-compiler", daemon=False)

    def start(self) -> None:
        self._go.set()
        self._thread.start()

    def pause(self) -> None:
        """Begin no program until `resume`."""
        self._go.clear()

    def resume(self) -> None:
        self._go.set()

    @property
    def running(self) -> bool:
        return self._thread.is_alive()

    def stop(self) -> None:
        """Compile no more; does not wait for the program that is being compiled."""
        self._stopped.set()

    def _run(self) -> None:
        began, failed = time.monotonic(), 0
        settings = program_store.environment()
        for key, program in self._programs:
            while not (ended := self._ended()) and not self._go.wait(PAUSE):
                pass
            if ended:
                return
            try:
                executable = compiler.compile_on(self._where, program, self._store, quietly=True)
            except Exception as error:
                if self._ended():
                    return
                if not failed:
                    self._report(f"compiling a program in the background failed: {type(error).__name__}: {error}")
                failed += 1
            else:
                if program_store.environment() != settings:  # its results may differ from the others'
                    self._report("jax settings have changed: the remaining programs are not compiled")
                    self.remaining = 0
                    return
                self.ready.append((key, executable))
            self.remaining -= 1
        if not self.remaining and not self._ended():
            missing = f" except {failed}; steps use larger ones instead" if failed else ""
            self._report(f"all programs are compiled{missing} ({time.monotonic() - began:.0f} s in the background)")

    def _ended(self) -> bool:
        return self._stopped.is_set() or not threading.main_thread().is_alive()
