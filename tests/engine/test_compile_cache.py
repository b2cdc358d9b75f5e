# SPDX-License-Identifier: Apache-2.0
"""Compiled programs are kept, also in a process that has compiled before, and found by the next one."""

import os
import subprocess
import sys
from pathlib import Path

import jax

from jaxserve.engine import compile_cache

SCRIPT = """
import sys
import jax, jax.numpy as jnp
from jaxserve.engine import compile_cache

jax.jit(lambda x: x + 1)(jnp.zeros(3))  # jax decides here that nothing is kept
hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append(event) if "cache_hits" in event else None)
compile_cache.keep(sys.argv[1], print)
jax.jit(lambda x: jnp.sin(x) * 3)(jnp.zeros(4))
print(len(hits))
"""


def run(folder: Path) -> str:
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", SCRIPT, str(folder)]
    return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout.strip()


def test_the_next_process_compiles_nothing(tmp_path: Path) -> None:
    assert run(tmp_path / "new" / "folder") == "0"
    assert list((tmp_path / "new" / "folder").iterdir())
    assert int(run(tmp_path / "new" / "folder")) > 0


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    told: list[str] = []
    compile_cache.keep(str(tmp_path / "file" / "folder"), told.append)
    assert len(told) == 1 and "compilation_cache_dir" in told[0]
    assert jax.config.jax_compilation_cache_dir is None


def test_what_the_program_has_decided_stays(tmp_path: Path) -> None:
    told: list[str] = []
    compile_cache.keep("", told.append)
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "theirs"))
    try:
        compile_cache.keep(str(tmp_path / "mine"), told.append)
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "theirs")
    finally:
        jax.config.update("jax_compilation_cache_dir", None)
    assert not told and not (tmp_path / "mine").exists()
