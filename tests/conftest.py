# SPDX-License-Identifier: Apache-2.0
"""Sets up all tests: CPU, eight devices, strict promotion; a guard against compilation."""

import contextlib
import gc
import itertools
import os
import signal
from collections.abc import Callable, Generator
from pathlib import Path

import pytest

from tests.fast import XLA_FLAGS


def pytest_configure(config: pytest.Config) -> None:
    """Runs before any test file is imported, so before anything asks jax for a device."""
    # A shell that starts the tests in the background has them ignore Ctrl-C, and their children with them.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    controls_workers = config.getoption("numprocesses") and not hasattr(config, "workerinput")
    if not controls_workers:  # a process that runs no tests need not wait for these imports
        _configure_jax()
        _configure_hypothesis()


def _configure_jax() -> None:
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["JAXSERVE_CPU_DTYPE"] = "float32"  # what tests expect is the same on all processors
    os.environ.setdefault("XLA_FLAGS", XLA_FLAGS)  # read once
    import jax

    jax.config.update("jax_num_cpu_devices", 8)
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.hookimpl(trylast=True)
def pytest_collection_finish() -> None:
    """Tracing makes many short-lived objects beside hundreds of thousands that stay: collect less often, and look at
    what was imported never again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


# Every compiled program maps its code and data for itself, 100 to 200 times, and the kernel allows a process 65,530
# maps: beyond them LLVM crashes.
MAPS, MOST_MAPS = Path("/proc/self/maps"), 30_000
_teardowns = itertools.count()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown() -> None:
    if next(_teardowns) % 20 == 0 and MAPS.exists() and MAPS.read_bytes().count(b"\n") > MOST_MAPS:
        import jax

        jax.clear_caches()
        gc.collect()


def _configure_hypothesis() -> None:
    from hypothesis import settings

    # No deadline: on a busy machine a first compile takes seconds. Where CI is set, the same
    # examples every time: a change must not turn red, or green, by luck.
    settings.register_profile("here", deadline=None)
    settings.register_profile("ci", deadline=None, derandomize=True, database=None)
    settings.load_profile("ci" if os.environ.get("CI") else "here")


# Each names its function; a trace without a compile already costs the step its milliseconds.
COMPILE_EVENTS = {
    "/jax/core/compile/jaxpr_trace_duration": "trace",
    "/jax/core/compile/backend_compile_duration": "compile",
}

ForbidCompiles = Callable[[], contextlib.AbstractContextManager[None]]


@pytest.fixture
def forbid_compiles() -> ForbidCompiles:
    """`with forbid_compiles():` after warm-up: a trace or compile inside, in any thread, fails."""
    return _forbid_compiles


@contextlib.contextmanager
def _forbid_compiles() -> Generator[None]:
    import jax.monitoring

    late: list[str] = []

    def listen(event: str, duration_secs: float, **details: str | int) -> None:
        if event in COMPILE_EVENTS:
            late.append(f"{COMPILE_EVENTS[event]} of {details.get('fun_name', 'unknown function')}")

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    if late:
        pytest.fail(f"after warm-up: {', '.join(late)}")
