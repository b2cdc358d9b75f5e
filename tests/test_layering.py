# SPDX-License-Identifier: Apache-2.0
"""Imports only go down: the real tree, and made-up trees that prove the check can fail."""

from pathlib import Path

import pytest

from tests import layering

ROOT = Path(__file__).parents[1]


def test_the_tree_keeps_the_rules() -> None:
    tree = layering.read_tree(ROOT)
    assert {"jaxserve.cli.inspect", "pallas_kernels.dispatch", "convert.files.header"} <= tree.keys()
    assert layering.violations(tree) == []


def check(tmp_path: Path, files: dict[str, str]) -> list[str]:
    """The violations of a tree with these files."""
    for name, source in files.items():
        path = tmp_path / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    return layering.violations(layering.read_tree(tmp_path))


GOOD = {
    "jaxserve/errors": "import enum",
    "jaxserve/config": "from jaxserve.types import X\nfrom jaxserve.errors import Y",
    "jaxserve/types": "from .errors import Y",
    "jaxserve/models/decoder": "import jax\nfrom pallas_kernels import flash, dispatch",
    "jaxserve/models/registry": "from . import decoder",
    "jaxserve/engine/scheduler": "import numpy\nfrom jaxserve.types import X",
    "jaxserve/engine/engine": "from jaxserve.models.decoder import D\nimport convert.load",
    "jaxserve/cli/run": "from jaxserve.server import app\nfrom jaxserve import __version__",
    "jaxserve/cli/devices": "from jaxserve.llm import L",
    "jaxserve/llm": "import jaxserve.engine.engine",
    "jaxserve/server/app": "import jaxserve.frontend.process\nimport aiohttp",
    "convert/load": "from jaxserve.models import decoder",
    "pallas_kernels/flash": "import jax, math\nfrom numpy import array\nfrom . import dispatch",
    "pallas_kernels/dispatch": "from jax.experimental import pallas",
}


GRAMMAR = {"jaxserve/sampling/grammar": "import llguidance"}


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
        ("jaxserve/quant/bad", "import jaxserve.parallel.mesh", "not below"),
        ("jaxserve/errors", "import jaxserve.types", "not below"),
        ("jaxserve/metrics", "import jaxserve.models", "not below"),
        ("jaxserve/profiling", "import pallas_kernels", "not below"),
        ("pallas_kernels/bad", "from jaxserve.errors import Y", "kernels use jax and numpy"),
        ("pallas_kernels/bad", "import flax", "imports flax; kernels use jax and numpy"),
        ("jaxserve/engine/scheduler", "import jax.numpy", "host module reaches jax"),
        ("jaxserve/engine/scheduler", "from . import engine", "engine.engine -> jaxserve.models"),
        ("jaxserve/engine/scheduler", "def f():\n    from flax import nnx", "-> flax"),
        ("jaxserve/novelty/x", "", "add it to RANKS"),
        ("jaxserve/novelty", "", "add it to RANKS"),
        ("jaxserve/models/decoder", "from .registry import R", "module cycle"),
        ("convert/load", "from jaxserve.engine.engine import E", "package cycle"),
    ],
)
def test_bad_tree_fails(tmp_path: Path, name: str, source: str, complaint: str) -> None:
    found = check(tmp_path, {**GOOD, name: source})
    assert any(complaint in line for line in found), found


def test_host_module_beside_a_heavy_package_file_fails(tmp_path: Path) -> None:
    found = check(tmp_path, {"jaxserve/sampling/__init__": "import jax"} | GRAMMAR)
    assert any("grammar -> jaxserve.sampling -> jax" in line for line in found), found
    (tmp_path / "jaxserve/sampling/__init__.py").write_text("")
    assert check(tmp_path, GRAMMAR) == []
