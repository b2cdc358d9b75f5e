# SPDX-License-Identifier: Apache-2.0
"""Makes executables of programs: shares them between the engines of this process, loads them from disk, or compiles.

    compile_all(programs)     in parallel threads, before an engine is ready
    compiled(program)         one, in this thread; `quietly` while an engine serves requests

An executable belongs to the engines that use it; only the RECENT last ones outlive them, for the next engine.
"""

import contextvars
import functools
import gc
import itertools
import os
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary, WeakValueDictionary

import jax

from jaxserve.engine.execute.program_store import Store
from jaxserve.engine.execute.programs import DONATED, STATIC, Program
from jaxserve.errors import JaxserveError
from jaxserve.parallel import mesh
from pallas_kernels import dispatch

RECENT = 128

# --- sharing --------------------------------------------------------------------------------------------------------


class Executables:
    """The executables of this process, by what they were made from."""

    def __init__(self) -> None:
        self._alive: WeakValueDictionary[Any, Any] = WeakValueDictionary()
        self._recent: OrderedDict[Any, Any] = OrderedDict()
        self._extra: WeakKeyDictionary[Any, int] = WeakKeyDictionary()
        self._lock = threading.Lock()

    def find(self, key: Any) -> Any:
        with self._lock:
            found = self._alive.get(key)
            if found is not None:
                self._use(key, found)
            return found

    def add(self, key: Any, executable: Any, extra: int) -> None:
        with self._lock:
            self._alive[key], self._extra[executable] = executable, extra
            self._use(key, executable)

    def extra(self, executable: Any) -> int:
        """The bytes per device that a run takes beside its arguments."""
        with self._lock:
            return self._extra[executable]

    def _use(self, key: Any, executable: Any) -> None:
        self._recent[key] = executable
        self._recent.move_to_end(key)
        while len(self._recent) > RECENT:
            self._recent.popitem(last=False)

    def drop_unused(self) -> None:
        """Forget those that no engine uses."""
        with self._lock:
            self._recent.clear()

    def clear(self) -> None:
        """Share none of those that exist with engines to come."""
        with self._lock:
            self._recent.clear()
            self._alive.clear()


EXECUTABLES = Executables()

# --- memory maps ----------------------------------------------------------------------------------------------------


class Maps:
    """This process's memory maps. A CPU's executable takes 100 to 200, and LLVM crashes the process when it gets no
    more, so they are counted before one is made."""

    EVERY = 16  # executables between two counts: counting 30,000 maps takes 20 ms
    SPARE = 8192  # for the executables made until the next count, in several threads, and for everything else

    def __init__(
        self, counted: Path = Path("/proc/self/maps"), limit: Path = Path("/proc/sys/vm/max_map_count")
    ) -> None:
        self._counted, self.limit, self._made = counted, 0, itertools.count()
        with suppress(OSError, ValueError):  # another system than Linux
            self.limit = int(limit.read_text())

    def make_room(self) -> None:
        """Called before an executable is made. Raises a JaxserveError if there is no room."""
        if not self.limit or next(self._made) % self.EVERY or self._count() < self.limit - self.SPARE:
            return
        EXECUTABLES.drop_unused()
        gc.collect()  # engines that are gone may be held by reference cycles
        if (count := self._count()) >= self.limit - self.SPARE:
            self._made = itertools.count()  # the next call counts again
            raise JaxserveError(
                f"this process has {count:,} memory maps, and vm.max_map_count allows {self.limit:,}: "
                "too few are left for another compiled program",
                "close engines that are no longer needed, or raise the limit with sysctl vm.max_map_count",
            )

    def _count(self) -> int:
        return self._counted.read_bytes().count(b"\n")


MAPS = Maps()

# --- compiling ------------------------------------------------------------------------------------------------------


def compile_all(
    programs: Sequence[Program],
    *,
    workers: int,
    store: Store | None = None,
    progress: Callable[[int, int, float], None] | None = None,
    beside: Future[Any] | None = None,
) -> list[Any]:
    """Compile the programs in parallel threads: XLA does not hold the GIL. `progress` gets the number done, the total
    and the seconds. If the future `beside` fails, compilation stops."""
    started, done, lock = time.monotonic(), 0, threading.Lock()

    def report(future: Any) -> None:
        nonlocal done
        with lock:
            done += 1
            if progress is not None and not future.cancelled():
                progress(done, len(programs), time.monotonic() - started)

    where = current()
    pool = ThreadPoolExecutor(workers)
    try:
        futures = [
            pool.submit(contextvars.copy_context().run, partial(compile_on, where, program, store))
            for program in programs
        ]
        for future in futures:
            future.add_done_callback(report)
        for future in as_completed(futures if beside is None else [*futures, beside]):
            future.result()
        return [future.result() for future in futures]
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # after Ctrl-C, running compilations finish on their own


type Where = tuple[Any, Any]  # a mesh, or None and a device


def current() -> Where:
    """Where this thread compiles for. Other threads do not inherit it."""
    return jax.sharding.get_mesh() if mesh.in_mesh() else None, jax.config.jax_default_device


def compile_on(where: Where, program: Program, store: Store | None, *, quietly: bool = False) -> Any:
    """`compiled` for another thread's mesh or device."""
    context, device = where
    with jax.default_device(device) if context is None else jax.set_mesh(context):
        return compiled(program, store, quietly=quietly)


def compiled(program: Program, store: Store | None = None, *, quietly: bool = False) -> Any:
    """The executable for the current mesh: from this process, from the store, or compiled.

    `quietly`: at low priority, and without running anything on the devices or allocating there, as XLA does for GPUs.
    """
    job = _Job(program, store, quietly=quietly)
    ways = _ways(job.platform, quietly=quietly)
    for options in ways:
        if (found := job.find(options)) is not None:
            return found
    return job.make(ways[-1])


# XLA times candidates for each matrix product on the device: in memory that the KV cache has taken, and under a lock
# that stops all steps. Without that it chooses by its cost model. What this costs a GPU's steps has not been measured;
# a start with --warmup all tunes every program and stores it, and later starts load it.
UNTUNED: dict[str, Any] = {"xla_gpu_autotune_level": 0}


def _ways(platform: str, *, quietly: bool) -> list[dict[str, Any]]:
    """The options to look for an executable with, best first. If none is found, it is compiled with the last."""
    best = _options(platform)
    return [best, best | UNTUNED] if quietly and platform != "cpu" else [best]


def _options(platform: str) -> dict[str, Any]:
    """Compiler options, unless XLA_FLAGS set them. LLVM's level 3 makes CPU programs slower: level 2 gave 5 to 16 %
    more tokens per second with 8 and 32 rows of the demo, 7 % with 32 rows of a 110M model, else about the same."""
    level = "xla_backend_optimization_level"
    return {level: 2} if platform == "cpu" and level not in os.environ.get("XLA_FLAGS", "") else {}


class _Job:
    """A program on the current mesh or device."""

    def __init__(self, program: Program, store: Store | None, *, quietly: bool) -> None:
        leaves, tree = jax.tree.flatten(program.shapes)
        shapes = tuple((leaf.shape, leaf.dtype, getattr(leaf, "sharding", None)) for leaf in leaves)
        context, device = current()
        where = context or device
        self._program, self._store, self._quietly = program, store, quietly
        self._key = (program.function, program.static, tree, shapes, where, dispatch.implementation())
        self._devices: list[Any] = list(where.devices.flat) if context is not None else [where or jax.devices()[0]]
        self.platform: str = self._devices[0].platform
        if self._key[-1] != ("kernel" if self.platform in ("gpu", "cuda") else "cpu"):
            self._store = None  # set by a test: jax may have traced parts of the program with another implementation

    def find(self, options: dict[str, Any]) -> Any:
        """The executable if it exists, in this process or on disk."""
        key = (self._key, repr(options))
        found = EXECUTABLES.find(key)
        if found is not None or self._store is None:
            return found
        MAPS.make_room()
        loaded = self._store.load(self._store.place(self._name(options)), self._devices)
        if loaded is None:
            return None
        EXECUTABLES.add(key, *loaded)
        return loaded[0]

    def make(self, options: dict[str, Any]) -> Any:
        program, store = self._program, self._store
        MAPS.make_room()
        file = store.place(self._name(options)) if store is not None else None
        jitted = jax.jit(
            _of_its_own(program.function),
            static_argnames=STATIC.get(program.function, ()),
            donate_argnames=DONATED[program.function],
        )
        compiling = partial(jitted.lower(*program.static, *program.shapes).compile, options or None)
        executable = _at_low_priority(compiling) if self._quietly else compiling()
        extra = _extra(executable)
        if store is not None and file is not None and store.place(self._name(options)) == file:
            store.save(file, executable, extra)
        EXECUTABLES.add((self._key, repr(options)), executable, extra)
        return executable

    def _name(self, options: dict[str, Any]) -> str:
        """Identifies the program in other processes too, where the function's qualified name stands for it. The devices
        are added because a mesh's repr omits them."""
        function, first = self._program.function, self._devices[0]
        kind = first.platform, first.device_kind, first.client.platform_version
        return repr((function.__module__, function.__qualname__, self._key[1:], self._devices, kind, options))


# Linux gives such a thread a tenth of a usual one's time when both want to run. The lowest priority would mean a
# seventieth: a busy engine would never have all programs.
LOWER = 10


def _at_low_priority[T](work: Callable[[], T]) -> T:
    """Run it in a separate thread, since a priority cannot be raised again. Only for work that does not hold the GIL:
    with the GIL, a thread that does not get to run would stop all others."""
    future: Future[T] = Future()

    def run() -> None:
        _lower_priority()
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    thread = threading.Thread(target=run, name="jaxserve-xla")
    thread.start()
    thread.join()
    return future.result()


def _lower_priority() -> None:
    if sys.platform == "linux":  # where each thread has its own priority
        with suppress(OSError):
            thread = threading.get_native_id()
            os.setpriority(os.PRIO_PROCESS, thread, os.getpriority(os.PRIO_PROCESS, thread) + LOWER)


def _of_its_own[**P, R](function: Callable[P, R]) -> Callable[P, R]:
    """The same as a new function: jax caches keep all that they made of a function for as long as it exists."""

    @functools.wraps(function)
    def call(*args: P.args, **options: P.kwargs) -> R:
        return function(*args, **options)

    return call


def _extra(executable: Any) -> int:
    found = executable.memory_analysis()
    return found.temp_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes if found else 0
