# SPDX-License-Identifier: Apache-2.0
"""Executables of one process: who keeps them, how many memory maps they may take, and what is compiled quietly."""

import gc
import weakref
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.config import EngineConfig
from jaxserve.engine.capacity import Memory, resolve
from jaxserve.engine.engine import Engine
from jaxserve.engine.execute import compiler
from jaxserve.engine.execute.compiler import Executables, Maps
from jaxserve.engine.execute.program_store import Store
from jaxserve.engine.execute.programs import Program
from jaxserve.engine.execute.runner import Runner
from jaxserve.errors import JaxserveError
from jaxserve.models import param_layout
from tests.fast import programs
from tests.models import tiny

SIZES: dict[str, Any] = dict(max_num_seqs=1, max_num_batched_tokens=8, max_model_len=16, block_size=8, num_blocks=5)
SPEC = tiny.SPECS["one-kv-head"]


class Thing:
    """In an executable's place."""


@pytest.fixture
def executables(monkeypatch: pytest.MonkeyPatch) -> Generator[Executables]:
    """Those of this test alone."""
    mine = Executables()
    monkeypatch.setattr(compiler, "EXECUTABLES", mine)
    yield mine


@pytest.fixture
def program() -> Program:
    config = EngineConfig(model="tiny", **SIZES)
    capacity = resolve(config, SPEC, Memory(on_cpu=True, dtype="float32"))
    return Runner(SPEC, param_layout.to_engine_layout(SPEC, tiny.public_params(SPEC)), capacity).program("edit")


# --- who keeps them -------------------------------------------------------------------------------------------------


def test_those_in_use_are_shared_and_few_others(executables: Executables, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "RECENT", 2)
    used = Thing()
    executables.add("used", used, 7)
    for name in "abc":
        executables.add(name, Thing(), 0)
    assert executables.find("used") is used and executables.extra(used) == 7
    assert executables.find("a") is None and executables.find("c") is not None
    executables.drop_unused()
    assert executables.find("used") is used and executables.find("c") is None
    executables.clear()
    assert executables.find("used") is None


@pytest.mark.usefixtures("executables")
def test_an_executable_goes_with_its_last_owner(program: Program) -> None:
    """Neither this cache nor jax's own keeps it."""
    client = jax.devices()[0].client
    gc.collect()
    before = len(client.live_executables())
    made = compiler.compiled(program)
    assert compiler.compiled(program) is made
    compiler.EXECUTABLES.drop_unused()
    gc.collect()
    assert len(client.live_executables()) == before + 1
    del made
    gc.collect()
    assert len(client.live_executables()) == before


# --- memory maps ----------------------------------------------------------------------------------------------------


def lines(path: Path, count: int) -> Path:
    path.write_text("a map\n" * count)
    return path


def test_maps_are_counted_and_room_is_made(executables: Executables, tmp_path: Path) -> None:
    (limit := tmp_path / "limit").write_text(f"{Maps.SPARE + 100}\n")
    maps = Maps(lines(tmp_path / "maps", 99), limit)
    executables.add("kept", Thing(), 0)
    maps.make_room()
    assert executables.find("kept") is not None
    lines(tmp_path / "maps", 100)
    with pytest.raises(JaxserveError, match=r"100 memory maps, and vm\.max_map_count allows 8,292"):
        for _ in range(Maps.EVERY):
            maps.make_room()
    assert executables.find("kept") is None, "what no engine uses goes first"
    with pytest.raises(JaxserveError, match="close engines"):
        maps.make_room()
    lines(tmp_path / "maps", 9)
    maps.make_room()


def test_where_maps_are_not_limited(tmp_path: Path) -> None:
    Maps(tmp_path / "absent", tmp_path / "absent").make_room()


def test_forty_models_in_one_process(executables: Executables, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each has different programs. Together they would take more maps than the limit, which the test lowers."""
    before = Path("/proc/self/maps").read_bytes().count(b"\n")
    (limit := tmp_path / "limit").write_text(str(before + Maps.SPARE + 1000))
    monkeypatch.setattr(compiler, "RECENT", 8)
    monkeypatch.setattr(compiler, "MAPS", Maps(limit=limit))
    made: list[weakref.ref[Any]] = []
    add = executables.add

    def noted(key: Any, executable: Any, extra: int) -> None:
        made.append(weakref.ref(executable))
        add(key, executable, extra)

    monkeypatch.setattr(executables, "add", noted)
    for number in range(40):
        spec = replace(SPEC, vocab_size=98 + 2 * number)
        config = EngineConfig(model="tiny", warmup=False, compilation_cache_dir=programs(), **SIZES)
        shapes = param_layout.abstract_params(spec, jnp.dtype("float32"))
        params = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), shapes)
        engine = Engine(config, spec=spec, params=params, report=lambda line: None)
        assert not np.asarray(engine.runner.tables).any()
        del engine
    alive = sum(ref() is not None for ref in made)
    assert len(made) == 40 and alive <= 8
    gc.collect()
    assert Path("/proc/self/maps").read_bytes().count(b"\n") < before + 2000


# --- quietly --------------------------------------------------------------------------------------------------------


def test_gpus_are_left_alone_by_a_quiet_compiler() -> None:
    assert compiler._ways("cuda", quietly=True) == [{}, {"xla_gpu_autotune_level": 0}]
    assert compiler._ways("cuda", quietly=False) == [{}]
    assert compiler._ways("cpu", quietly=True) == compiler._ways("cpu", quietly=False)


@pytest.mark.usefixtures("executables")
def test_a_quiet_compiler_takes_the_best_that_is_there(
    program: Program, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As on a GPU, with an option that a CPU has. What was compiled quietly is never taken for the other."""
    best, quiet = {"xla_backend_optimization_level": 1}, {"xla_backend_optimization_level": 0}
    monkeypatch.setattr(compiler, "_ways", lambda platform, quietly: [best, quiet] if quietly else [best])
    store = Store(tmp_path)
    poor = compiler.compiled(program, store, quietly=True)
    assert compiler.compiled(program, store, quietly=True) is poor
    good = compiler.compiled(program, store)
    assert good is not poor and len(list(tmp_path.iterdir())) == 2
    assert compiler.compiled(program, store, quietly=True) is good
    compiler.EXECUTABLES.clear()
    again = compiler.compiled(program, store, quietly=True)
    assert again not in (good, poor) and compiler.compiled(program, store) is again
