# SPDX-License-Identifier: Apache-2.0
"""How an engine starts: weights are read while programs are compiled, and a fault of one ends the other."""

import threading
from concurrent.futures import CancelledError
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import pytest

from jaxserve.config import ConfigError, EngineConfig
from jaxserve.engine.engine import Engine
from jaxserve.engine.execute import compiler, loading, memory
from jaxserve.engine.execute.runner import Runner
from jaxserve.engine.progress import StartProgress
from jaxserve.errors import JaxserveError
from jaxserve.models.decoder import Params
from jaxserve.parallel.mesh import make_mesh
from tests import tiny_llm
from tests.golden import load as golden

pytestmark = pytest.mark.usefixtures("beside")

LONG = 60.0  # seconds; who waits so long waits for nothing


@pytest.fixture
def config(tmp_path: Path) -> EngineConfig:
    folder = golden.write_checkpoint("llama-gqa-tied", tmp_path)
    sizes: dict[str, Any] = dict(max_num_seqs=1, max_num_batched_tokens=8, max_model_len=16, block_size=8, warmup="all")
    return EngineConfig(model=str(folder), compilation_cache_dir="", **sizes)


@pytest.fixture
def beside(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on an accelerator."""
    monkeypatch.setattr(loading, "reads_beside", lambda opened: True)


def start(config: EngineConfig) -> Engine:
    return Engine(config, report=lambda line: None)


def test_weights_are_read_while_programs_are_compiled(monkeypatch: pytest.MonkeyPatch, config: EngineConfig) -> None:
    """Each waits until the other has begun."""
    compiling, reading = threading.Event(), threading.Event()
    read, compile_on = loading.read, compiler.compile_on

    def slow_read(*given: Any) -> Params:
        reading.set()
        assert compiling.wait(LONG)
        return read(*given)

    def slow_compile(*given: Any) -> Any:
        compiling.set()
        assert reading.wait(LONG)
        return compile_on(*given)

    monkeypatch.setattr(loading, "read", slow_read)
    monkeypatch.setattr(compiler, "compile_on", slow_compile)
    monkeypatch.setattr(Runner, "every_key", lambda runner: ["edit", "add_counts"])  # few are enough
    engine = start(config)
    assert engine.runner.params["embed"]["weight"].shape == engine.model.shapes["embed"]["weight"].shape


def test_a_fault_of_the_weights_ends_compiling(monkeypatch: pytest.MonkeyPatch, config: EngineConfig) -> None:
    [file] = Path(config.model).glob("*.safetensors")
    opened, go_on, compiled = loading.open_folder, threading.Event(), list[Any]()

    def then_shorter(*given: Any) -> Any:
        found = opened(*given)
        with file.open("r+b") as shortened:
            shortened.truncate(file.stat().st_size - 1000)
        return found

    def slow_compile(*given: Any) -> None:
        assert go_on.wait(LONG)
        compiled.append(given)

    monkeypatch.setattr(loading, "open_folder", then_shorter)
    monkeypatch.setattr(compiler, "compile_on", slow_compile)
    with pytest.raises(JaxserveError, match="cannot read"):
        start(config)
    assert not compiled, "it was not reported until programs were compiled"
    go_on.set()


def test_after_ctrl_c_the_rest_is_not_read(config: EngineConfig) -> None:
    begun, go_on, heard = threading.Event(), threading.Event(), list[int]()

    def hear(what: str, done: int, total: int) -> None:
        heard.append(done)
        begun.set()
        assert go_on.wait(LONG)

    later = threading.Timer(0.2, go_on.set)
    with (
        pytest.raises(KeyboardInterrupt),
        loading.reading(loading.open_folder(config, None), on_progress=hear) as weights,
    ):
        assert begun.wait(LONG)
        later.start()
        raise KeyboardInterrupt
    assert isinstance(weights.exception(), CancelledError) and len(heard) == 1


def test_memory_for_unloaded_weights_is_counted(monkeypatch: pytest.MonkeyPatch, config: EngineConfig) -> None:
    model = loading.open_folder(config, None)
    monkeypatch.setattr(memory, "budget", lambda devices, share: (1000, 100))
    monkeypatch.setattr(memory, "devices_of", lambda model: [type("Device", (), {"platform": "gpu"})])
    found = memory.available(config, model)
    assert found.weights > 10_000 and (found.usable, found.used) == (1000, 100 + found.weights)
    held = loading.open_params(config, None, loading.read(model), None)[0]
    assert memory.available(config, held) == replace(found, used=100)


@pytest.mark.parametrize("axis", ["data", "fsdp"])
def test_a_mesh_that_would_replicate_the_model_is_refused(axis: str) -> None:
    mesh = jax.make_mesh((2, 2), (axis, "tensor"), axis_types=(jax.sharding.AxisType.Explicit,) * 2)
    with pytest.raises(ConfigError, match=f"mesh axis '{axis}' has size 2: data parallelism is not supported; run one"):
        loading.on_mesh(EngineConfig(model="any"), mesh)
    with pytest.raises(ConfigError, match="run one engine per replica"):
        tiny_llm.make(mesh=make_mesh(data=2, tensor=2))
    alone = make_mesh(data=1, tensor=2)
    assert loading.on_mesh(EngineConfig(model="any"), alone) is alone


def test_long_compilation_is_reported_now_and_then() -> None:
    lines: list[str] = []
    progress = StartProgress(lines.append, None, loading.done({}))
    for done, seconds in ((1, 10.0), (2, 16.0), (3, 20.0), (4, 31.0), (9, 50.0)):
        progress(done, 9, seconds)
    progress.close()
    assert lines == ["compiling 2/9 (16 s)", "compiling 4/9 (31 s)", "compiling 9/9 (50 s)"]
