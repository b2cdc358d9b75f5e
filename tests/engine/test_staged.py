# SPDX-License-Identifier: Apache-2.0
"""Staged readiness: an engine with few programs serves every request, and uses others as they come.

The compiler in the background is stopped by a Gate, which lets one program through at a time.
"""

import gc
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator
from typing import Any

import jax
import pytest

from jaxserve.engine.execute import compiler
from jaxserve.engine.execute.background import Background
from jaxserve.engine.execute.runner import Runner
from jaxserve.engine.schedule.packing import Layout, StepMessage
from jaxserve.errors import JaxserveError
from jaxserve.types.request import Request
from jaxserve.types.sampling_params import SamplingParams
from tests import tiny_llm
from tests.conftest import ForbidCompiles
from tests.engine.driver import FULL, ROWS, Driver, alone
from tests.engine.test_guards import work
from tests.engine.test_one_result import check, single
from tests.engine.workloads import run

LONG = 300.0  # seconds; who waits so long waits for nothing


def wait(condition: Callable[[], object]) -> None:
    end = time.monotonic() + LONG
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.002)


class Gate:
    """In the way of the compiler in the background."""

    def __init__(self) -> None:
        self.begun: list[Any] = []
        self._through = threading.Semaphore(0)
        self.fault: Exception | None = None
        self._compile = compiler.compile_on

    def compile_on(self, where: Any, program: Any, store: Any, *, quietly: bool = False) -> Any:
        if quietly:
            self.begun.append(program)
            self._through.acquire()
            if self.fault is not None:
                raise self.fault
        return self._compile(where, program, store, quietly=quietly)

    def open(self, programs: int = 1000) -> None:
        self._through.release(programs)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Generator[Gate]:
    gate, started = Gate(), list[Background[Any]]()
    start = Background.start

    def noted(background: Background[Any]) -> None:
        started.append(background)
        start(background)

    monkeypatch.setattr(Background, "start", noted)
    monkeypatch.setattr(compiler, "compile_on", gate.compile_on)
    monkeypatch.setattr(compiler, "_lower_priority", lambda: None)  # a busy machine would let it wait
    yield gate
    for each in started:
        each.stop()
    gate.open()
    wait(lambda: not any(each.running for each in started))


class Staged(Driver):
    """Notes of each step what it ran, and checks that it was there before."""

    def __init__(self, **options: Any) -> None:
        super().__init__(warmup="staged", **options)
        self.ran: list[Layout] = []
        launch = self.runner.launch

        def watched(message: StepMessage) -> Any:
            assert message.layout in self.runner._executables
            self.ran.append(message.layout)
            return launch(message)

        self.runner.launch = watched

    @property
    def compiler(self) -> Any:
        return self.engine._background

    def check(self) -> None:
        super().check()
        assert self.engine.metrics().compiled_late == 0


def greedy(name: str, tokens: int = 8) -> Request:
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    return Request(id=name, prompt_token_ids=[1 + len(name), 5, 6], params=params)


def test_few_programs_serve_everything(gate: Gate, forbid_compiles: ForbidCompiles) -> None:
    """All features at once, with nothing compiled meanwhile, in no thread."""
    driver = Staged(spare=10, budget=16)
    metrics = driver.engine.metrics()
    assert metrics.programs_compiled == len(driver.runner.covering()) < len(driver.runner.every_key())
    assert metrics.programs_pending == len(driver.runner.every_key()) - metrics.programs_compiled
    wait(lambda: gate.begun)
    with forbid_compiles(), jax.no_tracing():
        for seed in range(2):
            run(driver, work(seed))
    assert {layout.rows for layout in driver.ran if layout.decode} == {ROWS}
    assert driver.engine.compiling


def test_results_do_not_depend_on_what_is_compiled(gate: Gate) -> None:
    """Programs join in the middle of the work; every request gives what it gives alone in an engine that has all."""
    driver = Staged()
    turn = driver.turn

    def joined() -> Any:
        compiler = driver.compiler
        if driver.turns % 5 == 0 and compiler is not None and compiler.remaining:
            left = compiler.remaining
            gate.open(1)
            wait(lambda: compiler.remaining < left)
        return turn()

    driver.turn = joined
    for seed in range(2):
        jobs = work(seed)
        check(jobs, run(driver, jobs), alone(single(FULL), (job.request for job in jobs)))
    assert driver.runner.num_compiled == len(driver.runner.every_key()) > len(driver.runner.covering())


def test_what_was_compiled_is_used_by_the_next_step(gate: Gate) -> None:
    driver = Staged()
    driver.add(greedy("a", 40), greedy("bb", 40))
    for _ in range(4):
        driver.turn()
    assert driver.ran[-1].rows == ROWS, "two rows in a program of four"
    gate.open()
    wait(lambda: not driver.compiler.running)
    assert driver.ran[-1].rows == ROWS
    driver.turn()
    assert driver.ran[-1].rows == 2
    driver.finish()
    assert not driver.engine.compiling
    assert set(driver.runner.every_key()) == driver.runner._executables.keys() - {"fresh"}
    metrics = driver.engine.metrics()
    assert (metrics.programs_compiled, metrics.programs_pending) == (len(driver.runner.every_key()), 0)


def test_a_fault_of_the_compiler_is_logged_once(gate: Gate) -> None:
    said: list[str] = []
    gate.fault = JaxserveError("too few maps", "raise the limit")
    driver = Staged(report=said.append)
    gate.open()
    wait(lambda: not driver.compiler.running)
    driver.finish(greedy("a"), greedy("bb"))
    assert {layout.rows for layout in driver.ran if layout.decode} <= {1, ROWS}
    assert not driver.engine.compiling and driver.engine.metrics().programs_pending == 0
    faults = [line for line in said if "too few maps" in line]
    assert len(faults) == 1 and "JaxserveError" in faults[0]
    assert said[-1].startswith("all programs are compiled except ")


@pytest.mark.parametrize("end", ["close", "forget"])
def test_the_end_of_an_engine_ends_its_compiler(gate: Gate, end: str) -> None:
    driver = Staged()
    thread = driver.compiler
    wait(lambda: gate.begun)
    if end == "close":
        driver.engine.close()
    del driver
    gc.collect()
    gate.open(2)
    wait(lambda: not thread.running)
    assert len(gate.begun) == 1


def test_a_sleeping_engine_does_not_compile(gate: Gate) -> None:
    driver = Staged()
    thread = driver.compiler
    wait(lambda: len(gate.begun) == 1)
    driver.engine.sleep()
    gate.open(2)
    wait(lambda: len(thread.ready) == 1)
    time.sleep(0.05)
    assert len(gate.begun) == 1 and not driver.engine.compiling
    driver.engine.adopt()
    assert len(thread.ready) == 1
    driver.engine.wake()
    wait(lambda: len(gate.begun) == 3)
    driver.finish(greedy("a"))
    assert driver.engine.compiling


def test_settings_of_jax_that_change_end_it(gate: Gate) -> None:
    """What was compiled under others would round differently."""
    said: list[str] = []
    driver = Staged(report=said.append)
    wait(lambda: gate.begun)
    with jax.default_matmul_precision("highest"):  # this thread's alone
        gate.open(1)
        wait(lambda: len(gate.begun) == 2)
    before = jax.config.jax_default_matmul_precision
    jax.config.update("jax_default_matmul_precision", "highest")
    try:
        gate.open(1)
        wait(lambda: not driver.compiler.running)
    finally:
        jax.config.update("jax_default_matmul_precision", before)
    assert said[-1].startswith("jax settings have changed")
    driver.finish(greedy("a"))
    assert driver.engine.metrics().programs_pending == 0


def test_an_idle_thread_takes_what_was_compiled(gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without requests, programs of one kind are enough."""
    monkeypatch.setattr(Runner, "every_key", lambda self: [(rows, self.heads[0]) for rows in self.buckets.heads])
    monkeypatch.setattr(Runner, "covering", lambda self: self.every_key()[:1])
    llm = tiny_llm.make_async(warmup="staged")
    try:
        engine = llm._engine
        assert engine.compiling and 0 < engine.runner.num_compiled < len(engine.runner.every_key())
        gate.open()
        wait(lambda: not engine.compiling)
        assert engine.runner.num_compiled == len(engine.runner.every_key())
    finally:
        llm._end()


SCRIPT = """
import os, sys, time
from jaxserve.engine.execute.runner import Runner
from tests import tiny_llm
Runner.every_key = lambda self: [(rows, self.heads[0]) for rows in self.buckets.heads]  # no request is served
Runner.covering = lambda self: self.every_key()[:1]
llm = tiny_llm.make(warmup="staged", compilation_cache_dir="", max_num_seqs=32, max_num_batched_tokens=64)
assert llm._engine.compiling
child = os.fork()
if not child:  # where the thread does not exist; jax itself does not survive more than this there
    waits = llm._engine._background.running
    llm._engine._stop_compiling()
    os._exit(1 if waits else 7)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
assert llm._engine.compiling
if sys.argv[1] == "interrupt":
    os.kill(os.getpid(), 2)
    time.sleep(60)
"""


@pytest.mark.parametrize(("how", "code"), [("end", 0), ("interrupt", -signal.SIGINT)])
def test_the_end_of_a_process(how: str, code: int) -> None:
    """After the program that is being compiled, and without an abort; a fork of it has nothing to wait for."""
    done = subprocess.run([sys.executable, "-c", SCRIPT, how], capture_output=True, text=True, timeout=120)
    assert done.returncode == code, done.stderr
    assert done.stdout == "7\n"
