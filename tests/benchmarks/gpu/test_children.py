# SPDX-License-Identifier: Apache-2.0
"""A child's output, deadline and death; and the engine sections import only what a GPU machine has."""

import sys
from typing import Any

from benchmarks.gpu import children
from benchmarks.gpu.engine import separate
from benchmarks.gpu.engine.gap import TRACED_AS_RUN


def child(code: str, seconds: float = 60, **options: Any) -> children.ChildResult:
    return children.run([sys.executable, "-c", code], seconds=seconds, **options)


def test_a_childs_output_is_read() -> None:
    found = child("print('a warning'); print('{\"a\": 1}'); print('{\"a\": 2, \"b\": 3}')")
    assert found.merged() == {"a": 2, "b": 3} and found.fault is None


def test_a_late_child_is_killed_and_its_output_counts() -> None:
    found = child("import time\nprint('{\"done\": 7}', flush=True)\ntime.sleep(600)", seconds=3)
    assert found.late and found.merged() == {"done": 7} and found.fault and found.fault.startswith("killed after")


def test_a_child_that_dies_says_why() -> None:
    assert child("raise ValueError('no such thing')").fault == "exit code 1: ValueError: no such thing"
    assert child("import os; os.abort()").fault == "exit code -6: nothing on stderr"
    unknown = child("import jax; jax.devices()", env={"XLA_FLAGS": separate.UNKNOWN.flags})
    assert unknown.fault == "unknown flag"


def test_this_version_of_jax_knows_the_flags() -> None:
    """All at once, except the one that is tried in case a later version has it."""
    known = [variant.flags for variant in separate.VARIANTS if "raft" not in variant.name]
    known.append(TRACED_AS_RUN)
    assert child("import jax; jax.devices()", env={"XLA_FLAGS": " ".join(known)}).fault is None


BLOCKED = """
import importlib.abc, sys
class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in BLOCKED:
            raise ImportError(f"{name} is not there")
sys.meta_path.insert(0, Blocked())
import benchmarks.gpu.command, benchmarks.gpu.engine.child, jaxserve.engine.engine
from jax._src import xla_bridge
print('{"imported": true, "device": %s}' % str(xla_bridge.backends_are_initialized()).lower())
"""


def test_the_engine_needs_few_packages() -> None:
    """A machine with a GPU may have only jax, flax and numpy, and accept msgspec and tqdm, but no server's packages."""
    others = {"transformers", "tokenizers", "huggingface_hub", "safetensors", "pydantic", "aiohttp", "llguidance"}
    others |= {"jinja2", "prometheus_client", "orbax", "torch", "pytest", "tyro", "hypothesis", "openai"}
    found = child(f"BLOCKED = {others!r}\n{BLOCKED}")
    # Importing must not initialize the device either: JAX's memory settings are made later.
    assert found.merged() == {"imported": True, "device": False}, found.stderr[-300:]
