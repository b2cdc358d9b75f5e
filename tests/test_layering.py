# SPDX-License-Identifier: Apache-2.0
"""Imports only go down: the real tree, and made-up trees that prove the check can fail."""

import tomllib
from pathlib import Path

import pytest

from tests import layering

ROOT = Path(__file__).parents[1]


def test_the_tree_keeps_the_rules() -> None:
    tree = layering.read_tree(ROOT)
    assert {"jaxserve.cli.inspect", "pallas_kernels.dispatch", "convert.files.header"} <= tree.keys()
    assert layering.violations(tree) == []


def test_what_does_not_reach_jax_is_typed_strictly() -> None:
    strict = {ROOT / path for path in tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pyright"]["strict"]}
    assert all(path.exists() for path in strict)
    tree = layering.read_tree(ROOT)
    free = [ROOT.joinpath(*name.split(".")).with_suffix(".py") for name in tree if not layering.road_to_jax(name, tree)]
    files = {file for file in free if file.exists()}  # package files are docstrings
    assert len(files) > 100
    assert {file for file in files if strict.isdisjoint({file, *file.parents})} == set()


def check(tmp_path: Path, files: dict[str, str]) -> list[str]:
    """The violations of a tree with these files."""
    for name, source in files.items():
        path = tmp_path / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    return [line for line in layering.violations(layering.read_tree(tmp_path)) if "not in the tree" not in line]


GOOD = {
    "jaxserve/errors": "import enum",
    "jaxserve/config": "from jaxserve.types.a import X\nfrom jaxserve.errors import Y",
    "jaxserve/types/a": "from ..errors import Y",
    "jaxserve/models/decoder": "import jax\nfrom pallas_kernels import flash, dispatch",
    "jaxserve/models/registry": "from . import decoder",
    "jaxserve/engine/schedule/scheduler": "import numpy\nfrom jaxserve.types.a import X",
    "jaxserve/engine/engine": "from jaxserve.models.decoder import D\nimport convert.load",
    "jaxserve/cli/run": "from jaxserve.server import app\nfrom jaxserve import __version__",
    "jaxserve/cli/with_jax/devices": "from jaxserve.llm import L",
    "jaxserve/llm": "import jaxserve.engine.engine",
    "jaxserve/server/app": "import jaxserve.frontend.process\nimport aiohttp",
    "convert/load": "from jaxserve.models import decoder",
    "pallas_kernels/flash": "import jax, math\nfrom numpy import array\nfrom . import dispatch",
    "pallas_kernels/dispatch": "from jax.experimental import pallas",
}


TOKENIZER = {"jaxserve/text/tokenizer": "import tokenizers"}


def test_good_tree_passes(tmp_path: Path) -> None:
    assert check(tmp_path, GOOD) == []


@pytest.mark.parametrize(
    ("name", "source", "complaint"),
    [
        ("jaxserve/models/bad", "from jaxserve.engine import engine", "not below"),
        ("jaxserve/models/bad", "from ..engine.engine import E", "not below"),
        ("jaxserve/models/bad", "def f():\n    import jaxserve.server.app", "not below"),
        ("jaxserve/models/bad", "import convert", "not below"),
        ("jaxserve/engine/bad", "import jaxserve.server", "not below"),
        ("jaxserve/text/bad", "import jaxserve.parallel.mesh", "not below"),
        ("jaxserve/text/bad", "import jaxserve.config", "not below"),
        ("jaxserve/errors", "import jaxserve.types.a", "not below"),
        ("jaxserve/exit_codes", "import jaxserve.models", "not below"),
        ("jaxserve/engine/schedule/bad", "import jaxserve.engine.execute.runner", "not below"),
        ("pallas_kernels/bad", "from jaxserve.errors import Y", "kernels use jax and numpy"),
        ("pallas_kernels/bad", "import flax", "imports flax; kernels use jax and numpy"),
        ("jaxserve/engine/schedule/bad", "import jax.numpy", "is to be free of jax"),
        ("jaxserve/cli/run", "from jaxserve.llm import L", "llm -> jaxserve.engine.engine -> jaxserve.models"),
        ("jaxserve/engine/schedule/bad", "def f():\n    from flax import nnx", "-> flax"),
        ("jaxserve/novelty/x", "", "add it to ORDER"),
        ("jaxserve/novelty", "", "add it to ORDER"),
        ("jaxserve/models/decoder", "from .registry import R", "module cycle"),
        ("convert/load", "from jaxserve.engine.engine import E", "package cycle"),
    ],
)
def test_bad_tree_fails(tmp_path: Path, name: str, source: str, complaint: str) -> None:
    found = check(tmp_path, {**GOOD, name: source})
    assert any(complaint in line for line in found), found


def test_a_module_beside_a_heavy_package_file_fails(tmp_path: Path) -> None:
    found = check(tmp_path, {"jaxserve/text/__init__": "import jax"} | TOKENIZER)
    assert any("tokenizer -> jaxserve.text -> jax" in line for line in found), found
    (tmp_path / "jaxserve/text/__init__.py").write_text("")
    assert check(tmp_path, TOKENIZER) == []


def test_a_rule_for_what_is_not_there_fails(tmp_path: Path) -> None:
    assert "jaxserve.frontend is in the rules and not in the tree" in layering.violations(layering.read_tree(tmp_path))
