# SPDX-License-Identifier: Apache-2.0
"""The names of the package are importable and typed, and importing the package imports nothing heavy."""

import ast
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import jaxserve

STUB = Path(__file__).parents[1] / "jaxserve" / "__init__.pyi"


def test_importing_the_package_imports_nothing_heavy() -> None:
    script = (
        "import sys, jaxserve\n"
        "heavy = {'jax', 'jaxlib', 'flax', 'transformers', 'numpy', 'tqdm'}\n"
        "assert 'LLM' in dir(jaxserve)\n"
        "assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()\n"
        "from jaxserve import EngineConfig, RequestOutput, SamplingParams\n"
        "assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()\n"
        "jaxserve.LLM\n"
        "assert 'jax' in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def test_every_name_is_importable_and_known_to_type_checkers() -> None:
    imported = [node for node in ast.walk(ast.parse(STUB.read_text())) if isinstance(node, ast.ImportFrom)]
    stubs = {str(alias.asname): node.module for node in imported for alias in node.names}
    names = vars(jaxserve)["__all__"]
    assert sorted([*stubs, "__version__"]) == sorted(names)
    for name, module in stubs.items():
        assert getattr(jaxserve, name).__module__ == module
    assert set(names) <= set(dir(jaxserve))


def test_other_names_do_not_exist() -> None:
    name = "Server"
    with pytest.raises(AttributeError, match="no attribute 'Server'"):
        getattr(jaxserve, name)


def test_no_two_classes_share_a_name() -> None:
    counts: Counter[str] = Counter()
    for package in ("jaxserve", "pallas_kernels", "convert", "benchmarks"):
        for path in (STUB.parents[1] / package).rglob("*.py"):
            found = {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ClassDef)}
            counts.update(name for name in found if not name.startswith("_"))
    assert [name for name, count in counts.items() if count > 1] == []
