# SPDX-License-Identifier: Apache-2.0
"""However an engine's process ends, its streams end at once, with a reason, and no process is left."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from jaxserve.config import EngineConfig
from jaxserve.errors import EngineError
from jaxserve.frontend import process
from jaxserve.frontend.client import EngineClient
from jaxserve.frontend.process import EngineProcess, EngineState
from jaxserve.types.sampling_params import SamplingParams
from tests.host import living

PARAMS = SamplingParams(temperature=0, max_tokens=100, ignore_eos=True, detokenize=False)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> EngineConfig:
    folder = living.write_model(tmp_path_factory.mktemp("model"))
    return EngineConfig(model=str(folder), **living.OPTIONS, skip_tokenizer_init=True)


def run[T](work: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(asyncio.wait_for(work, living.PATIENCE))


def gone(pid: int | None) -> bool:
    """Whether the process has ended, also as a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


async def fail(engine: EngineProcess, front: EngineClient, cause: Callable[[], object]) -> tuple[list[str], float]:
    """The errors that end five streams and a call, and the time from the cause to the last of them."""

    async def consume(first: int) -> None:
        async for _ in front.outputs(front.preparer.prepare([first], PARAMS)):
            pass

    tasks = [asyncio.create_task(consume(i)) for i in range(5)]
    await asyncio.sleep(0.05)
    cause()
    began = time.monotonic()
    found = await asyncio.gather(*tasks, return_exceptions=True)
    took = time.monotonic() - began
    assert all(type(each) is EngineError for each in found)
    for _ in range(2):
        with pytest.raises(EngineError):
            front.open(front.preparer.prepare([1], PARAMS))
        with pytest.raises(EngineError):
            await front.call("metrics")
    with pytest.raises(EngineError):
        engine.check_alive()
    assert not front.names() and not engine._streams and not engine._calls
    return [str(each) for each in found], took


def test_a_child_that_is_killed_and_another_after_it(config: EngineConfig) -> None:
    states: list[EngineState] = []
    with living.process(config, on_change=states.append) as engine:
        front = living.front(engine, config)
        pid = engine.pid
        assert pid is not None
        reported, took = run(fail(engine, front, lambda: os.kill(pid, signal.SIGKILL)))
        assert took < 5 and set(reported) == {states[-1].error} and "SIGKILL" in reported[0]
        assert engine.state.phase == states[-1].phase == "failed"
        living.wait(lambda: not Path(f"/proc/{pid}").exists(), seconds=10)  # no zombie either
    assert engine.state.phase == "failed"
    with living.process(config) as engine:  # and signals that all processes of a terminal or a service get
        assert engine.pid is not None and engine.pid != pid
        os.kill(engine.pid, signal.SIGINT)
        front = living.front(engine, config)
        os.kill(engine.pid, signal.SIGTERM)
        [*_, last] = run(living.outputs(front, [1, 2], PARAMS))
        assert len(last.outputs[0].token_ids) == 100
        stream = run(opened(front))
        calls = [engine.call("metrics") for _ in range(50)]
        engine.stop(grace=living.PATIENCE)
        assert engine.state == EngineState("stopped", "")
        assert all(call.done() for call in calls)
        with pytest.raises(EngineError, match="shut down"):
            run(to_the_end(stream))
        assert engine._process is not None and engine._process.returncode == 0  # by itself


async def opened(front: EngineClient) -> Any:
    return front.open(front.preparer.prepare([3], PARAMS))


async def to_the_end(stream: Any) -> None:
    """The error that ends a stream, after all of its outputs."""
    while True:
        await stream.next()


def test_a_step_that_raises(config: EngineConfig, capfd: pytest.CaptureFixture[str]) -> None:
    with living.process(config, command=living.faulty("raise")) as engine:
        front = living.front(engine, config)
        reported, took = run(fail(engine, front, lambda: None))
        assert took < 5 and set(reported) == {engine.state.error}
        assert "the engine failed: ValueError: of the device" in reported[0] and "\n" not in reported[0]
        living.wait(lambda: gone(engine.pid), seconds=10)
    assert "Traceback" in capfd.readouterr().err


@pytest.mark.parametrize(("fault", "words"), [("loop", "completed no step"), ("hold", "no heartbeat")])
def test_the_watchdog(config: EngineConfig, capfd: pytest.CaptureFixture[str], fault: str, words: str) -> None:
    """Both in a Python loop, and in C code that holds Python's lock."""
    with living.process(config, command=living.faulty(fault), watchdog=2) as engine:
        front = living.front(engine, config)
        reported, took = run(fail(engine, front, lambda: None))
        assert words in reported[0] and took > 1
        living.wait(lambda: gone(engine.pid), seconds=10)
    assert f"in _{fault}" in capfd.readouterr().err  # where it hung


def test_the_watchdog_ignores_slow_and_idle_engines(config: EngineConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    with living.process(config, command=living.faulty("slow"), watchdog=2) as engine:
        front = living.front(engine, config)
        time.sleep(2.5)
        clock = time.monotonic
        with monkeypatch.context() as patched:  # this process was stopped meanwhile: a laptop's lid was closed
            patched.setattr(process.time, "monotonic", lambda: clock() + 1e6)
            time.sleep(1)
        [last] = run(living.outputs(front, [1], PARAMS))
        assert last.outputs[0].finish_reason == "abort" and engine.state.phase == "ready"


def test_a_child_that_sends_garbage(config: EngineConfig) -> None:
    with living.process(config, command=living.faulty("chatter")) as engine:
        reported, took = run(fail(engine, living.front(engine, config), lambda: None))
        assert took < 5 and "reading from the engine failed" in reported[0]
        living.wait(lambda: gone(engine.pid), seconds=10)


# --- at the start ---------------------------------------------------------------------------------------------------


def failed_start(config: EngineConfig, **options: Any) -> str:
    with living.process(config, **options) as engine:
        living.wait(lambda: engine.state.phase == "failed")
        assert engine._process is not None and engine._process.wait(5) == 1
        assert engine.state.error is not None
        return engine.state.error


def test_faults_at_the_start(tmp_path: Path, config: EngineConfig, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["Unheard"]}')
    assert "the architecture 'Unheard' is not supported; " in failed_start(EngineConfig(model=str(tmp_path)))
    few = EngineConfig(**{**living.OPTIONS, "num_blocks": 2, "max_model_len": 64}, model=config.model)
    assert "max_model_len" in failed_start(few)
    assert "Traceback" not in capfd.readouterr().err
    error = failed_start(config, command=living.faulty("start"))
    assert error == "ValueError: of the device\\nat /a/path; see its log"
    assert "Traceback" in capfd.readouterr().err
    assert "exit code 3" in died(config, [sys.executable, "-c", "import sys; sys.exit(3)"])


def died(config: EngineConfig, command: list[str]) -> str:
    with living.process(config, command=command) as engine:
        living.wait(lambda: engine.state.phase == "failed")
        return engine.state.error or ""


def test_a_stop_while_it_starts_does_not_wait(config: EngineConfig) -> None:
    with living.process(config, command=living.faulty("compile")) as engine:
        living.wait(lambda: engine.state.detail == "opening the model")
        engine.stop(grace=living.PATIENCE)
        assert engine.state.phase == "stopped"
        assert engine._process is not None and engine._process.returncode == 0
    never = EngineProcess(config)
    never.stop()
    assert never.state.phase == "stopped"


PARENT = """
import sys, time
from jaxserve.config import EngineConfig
from jaxserve.frontend import wire
from jaxserve.frontend.process import EngineProcess
from jaxserve.types.request import Request
from tests.host import living
config = EngineConfig(model=sys.argv[1], **living.OPTIONS)
engine = EngineProcess(config, command=living.faulty(sys.argv[2]), watchdog=3)
engine.start()
living.wait(lambda: engine.state.phase == "ready" or engine.state.detail == sys.argv[3])
engine._post(wire.add_of(Request(id="r", prompt_token_ids=[1])))
time.sleep(0.5)
print(engine.pid, flush=True)
time.sleep(100)
"""


@pytest.mark.parametrize(
    ("fault", "detail", "seconds"),
    [
        ("compile", "opening the model", 2),
        ("hold", "ready", 20),  # no thread of Python runs: the last to be armed is faulthandler's
    ],
)
def test_a_parent_that_is_killed_leaves_no_orphan(
    config: EngineConfig, fault: str, detail: str, seconds: float
) -> None:
    command = [sys.executable, "-c", PARENT, config.model, fault, detail]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert not gone(pid)
        parent.kill()
        living.wait(lambda: gone(pid), seconds=seconds)
