# SPDX-License-Identifier: Apache-2.0
"""Executables on disk: the next process neither traces nor compiles, and no wrong program is ever run."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.engine.execute import compiler, jax_start, program_store
from jaxserve.engine.execute.compiler import Executables
from jaxserve.engine.execute.program_store import Store
from jaxserve.engine.execute.runner import Runner
from jaxserve.models import param_layout
from pallas_kernels import dispatch
from tests.engine.execute.smallest import CAPACITY, SPEC
from tests.fast import XLA_FLAGS
from tests.models import tiny
from tests.server import live

SCRIPT = """
import json, sys
import jax
from jaxserve.config import EngineConfig
from jaxserve.engine.engine import Engine
from jaxserve.types.request import Request
from jaxserve.types.sampling_params import SamplingParams

counts = {"trace": 0, "lower": 0, "compile": 0}
def count(event, duration, **_):
    for name, part in (("trace", "jaxpr_trace"), ("lower", "jaxpr_to_mlir"), ("compile", "backend_compile")):
        counts[name] += part in event
jax.monitoring.register_event_duration_secs_listener(count)
Engine._compile_the_rest = lambda self: None
engine = Engine(EngineConfig(**json.loads(sys.argv[1])), report=lambda line: None)
asked = SamplingParams(max_tokens=6, temperature=0.8, seed=3, logprobs=2, ignore_eos=True, repetition_penalty=1.2)
engine.add(Request(id="a", prompt_token_ids=list(range(20, 40)), params=asked))
tokens = []
while engine.unfinished:
    for update in engine.step():
        tokens += update.token_ids
print(json.dumps({"tokens": tokens, **counts}))
"""


@pytest.fixture
def forgetful() -> Generator[None]:
    """Nothing is shared within this process meanwhile."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiler, "EXECUTABLES", Executables())
        yield


@pytest.fixture(scope="module")
def runner() -> Runner:
    return Runner(SPEC, param_layout.to_engine_layout(SPEC, tiny.public_params(SPEC)), CAPACITY)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path)


def files(store: Store) -> list[Path]:
    return sorted(store.folder.iterdir())


@pytest.mark.parametrize("devices", [1, 2])
def test_the_next_process_neither_lowers_nor_compiles(tmp_path: Path, devices: int) -> None:
    """Also the output is the same. One row, and what an engine compiles before it is ready, without the rest that it
    would compile afterwards: every kind of program."""
    model = live.write_model(tmp_path / "tiny")
    options = {"model": str(model), "max_num_seqs": 1, "max_num_batched_tokens": 32, "max_model_len": 64}
    options |= {"block_size": 8, "compilation_cache_dir": str(tmp_path / "kept" / "there")}
    options |= {"tensor_parallel_size": devices, "warmup": "staged"}
    environment = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    environment["XLA_FLAGS"] = f"{XLA_FLAGS} --xla_force_host_platform_device_count={devices}"
    command = [sys.executable, "-c", SCRIPT, json.dumps(options)]
    first, second = (
        json.loads(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)
        for _ in range(2)
    )
    assert first["compile"] > 10
    assert second["compile"] == second["lower"] == 0
    assert second["tokens"] == first["tokens"] and len(first["tokens"]) == 6


@pytest.mark.usefixtures("forgetful")
def test_stored_programs_compute_the_same(runner: Runner, store: Store) -> None:
    program = runner.program("edit")
    made = compiler.compiled(program, store)
    [file] = files(store)
    assert file.stat().st_mode & 0o077 == 0
    compiler.EXECUTABLES.clear()
    read = compiler.compiled(program, store)
    assert read is not made

    def run(executable: Any) -> list[np.ndarray]:
        runner.allocate()
        cells = np.full(executable.args_info[0][2].shape, -1, np.int32)
        cells[:2], cells[len(cells) // 4 : len(cells) // 4 + 2] = (0, 1), (3, 4)
        return [np.asarray(leaf) for leaf in jax.tree.leaves(executable(runner.cache, runner.tables, jnp.array(cells)))]

    for ours, theirs in zip(run(made), run(read), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.usefixtures("forgetful")
@pytest.mark.parametrize("content", [b"", b"\x80", b"no pickle", None])
def test_half_a_file_is_replaced(runner: Runner, store: Store, content: bytes | None) -> None:
    program = runner.program("edit")
    compiler.compiled(program, store)
    [file] = files(store)
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2] if content is None else content)
    compiler.EXECUTABLES.clear()
    assert compiler.compiled(program, store) is not None
    assert files(store) == [file] and len(file.read_bytes()) > len(whole) // 2


@pytest.mark.usefixtures("forgetful")
def test_programs_that_others_can_write_are_not_run(runner: Runner, store: Store) -> None:
    compiler.compiled(runner.program("edit"), store)
    [file] = files(store)
    device = runner.device
    assert store.load(file, [device]) is not None
    for mode in 0o620, 0o602, 0o666:
        file.chmod(mode)
        assert store.load(file, [device]) is None
    assert file.exists()


def refuse(*_: object, **__: object) -> None:
    raise PermissionError("not yours")


@pytest.mark.usefixtures("forgetful")
@pytest.mark.parametrize("call", ["utime", "replace", "unlink"])
def test_a_folder_of_many_users(runner: Runner, store: Store, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    """Where files of others can be neither touched nor replaced nor removed, a start goes on without them."""
    compiler.compiled(runner.program("edit"), store)
    [file] = files(store)
    monkeypatch.setattr(os, call, refuse)
    if call == "utime":
        assert store.load(file, [runner.device]) is not None
    elif call == "replace":
        compiler.EXECUTABLES.clear()
        compiler.compiled(runner.program(("set_rows", 1)), store)
        assert files(store) == [file], "a part of a file stays"
    else:
        file.write_bytes(b"broken")
        assert store.load(file, [runner.device]) is None
    monkeypatch.setattr(Path, "open", refuse)
    assert store.load(file, [runner.device]) is None


def test_the_key_covers_everything_that_matters(monkeypatch: pytest.MonkeyPatch, store: Store) -> None:
    seen = {store.place("program"), store.place("another")}
    assert store.place("program") in seen

    def new() -> bool:
        before = len(seen)
        seen.add(store.place("program"))
        return len(seen) > before

    with jax.default_matmul_precision("highest"):  # for this thread alone
        assert new()
    with monkeypatch.context() as patch:
        patch.setenv("XLA_FLAGS", "--xla_of=another")
        assert new()
    for name, value in ("LOADED", "another"), ("_machine", lambda: "another"):
        with monkeypatch.context() as patch:
            patch.setattr(program_store, name, value)
            assert new()
    with monkeypatch.context() as patch:
        patch.setattr(jax_start, "cpu_threads", lambda: 7)
        assert new()
    assert not new()


def test_the_digest_is_of_all_code(tmp_path: Path) -> None:
    """The digest covers each file's name and content."""
    seen = {program_store.sources(tmp_path)}
    for change in (
        lambda: (tmp_path / "a.py").write_text(""),
        lambda: (tmp_path / "a.py").write_text("#"),
        lambda: (tmp_path / "a.py").rename(tmp_path / "b.py"),
        lambda: (tmp_path / "tiles.json").write_text("{}"),
    ):
        change()
        seen.add(program_store.sources(tmp_path))
    assert len(seen) == 5
    assert program_store.sources() == program_store.LOADED


@pytest.mark.usefixtures("forgetful")
def test_nothing_is_stored_if_the_key_is_uncertain(
    runner: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Code that changed after it was imported, flags in a file, settings that change, forced implementations."""
    reported: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(program_store, "LOADED", "what was imported")
        assert program_store.open_store(str(tmp_path / "x"), reported.append) is None
    with monkeypatch.context() as patch:
        patch.setenv("XLA_FLAGS", str(tmp_path / "flags.txt"))
        assert program_store.open_store(str(tmp_path / "x"), reported.append) is None
    store = program_store.open_store(str(tmp_path / "x"), reported.append)
    assert store is not None and not reported
    with dispatch.use("interpret"):
        compiler.compiled(runner.program("edit"), store)
    memory = compiler._extra

    def meanwhile(executable: Any) -> int:
        monkeypatch.setattr(jax_start, "cpu_threads", lambda: 7)
        return memory(executable)

    monkeypatch.setattr(compiler, "_extra", meanwhile)
    compiler.compiled(runner.program("edit"), store)
    assert files(store) == []
    compiler.EXECUTABLES.clear()
    compiler.compiled(runner.program("edit"), store)
    assert len(files(store)) == 1


@pytest.mark.usefixtures("forgetful")
def test_the_memory_of_a_run_is_kept_on_disk(runner: Runner, store: Store) -> None:
    """What the compiler says of it may be lost there, and an engine that asks again would have to compile again."""
    program = runner.program((1, runner.heads[-1]))
    made = compiler.compiled(program, store)
    taken = compiler.EXECUTABLES.extra(made)
    memory = made.memory_analysis()
    assert taken == memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes > 0
    compiler.EXECUTABLES.clear()
    again = compiler.compiled(program, store)
    assert again is not made and compiler.EXECUTABLES.extra(again) == taken


def test_keys_contain_no_memory_addresses(runner: Runner, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such addresses would differ in the next process."""
    keys: list[str] = []
    monkeypatch.setattr(compiler, "EXECUTABLES", Executables())
    monkeypatch.setattr(Store, "load", lambda self, file, devices: (Executables(), 0))  # anything will do
    monkeypatch.setattr(Store, "place", lambda self, program: keys.append(program) or Path(program[:9]))
    for key in runner.every_key():
        compiler.compiled(runner.program(key), store)
    assert len(set(keys)) == len(keys) == len(runner.every_key())
    assert not [key for key in (*keys, program_store.environment()) if re.search(r"0x[0-9a-f]{5}|object at", key)]


def test_old_files_are_deleted(tmp_path: Path) -> None:
    names = [f"{name}{suffix}" for name in "ab" for suffix in (program_store.SUFFIX, program_store.PARTIAL)]
    for name in (*names, "of-another-user"):
        (tmp_path / name).touch()
    long_ago = time.time() - (program_store.DAYS + 1) * 86400
    for name in ("a.executable", "a.partial", "of-another-user"):
        os.utime(tmp_path / name, (long_ago, long_ago))
    Store(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"b.executable", "b.partial", "of-another-user"}


def test_a_folder_that_cannot_be_written_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    reported: list[str] = []
    assert program_store.open_store(str(tmp_path / "file" / "folder"), reported.append) is None
    assert len(reported) == 1 and "compilation_cache_dir" in reported[0]


def test_no_store_if_jax_has_its_own_cache(tmp_path: Path) -> None:
    reported: list[str] = []
    assert program_store.open_store("", reported.append) is None
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "theirs"))
    try:
        assert program_store.open_store(str(tmp_path / "mine"), reported.append) is None
    finally:
        jax.config.update("jax_compilation_cache_dir", None)
    assert not reported and not (tmp_path / "mine").exists()
