# SPDX-License-Identifier: Apache-2.0
"""The README's map of the code equals the tree."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxserve.engine.execute import program_store
from tests.golden import load as golden

ROOT = Path(__file__).parents[1]
HEADING = "## Map of the code"
CODE = ("jaxserve", "pallas_kernels", "convert", "benchmarks")  # every file of these is on the map
OURS = (*CODE, "tests")  # of tests, every folder


def read_map(readme: str) -> list[str]:
    """The paths on the map: folders end in a slash and hold the deeper lines that follow."""
    found: list[str] = []
    folders: list[str] = []
    for line in readme.partition(HEADING)[2].partition("\n## ")[0].splitlines():
        if not line.startswith("    "):
            continue
        name, *about = line.split(maxsplit=1)
        depth = (len(line) - len(line.lstrip()) - 4) // 2
        assert about, f"{name} has no description"
        assert depth <= len(folders), f"{name} is indented too far"
        del folders[depth:]
        found.append("".join(folders) + name)
        if name.endswith("/"):
            folders.append(name)
    return found


def tree(root: Path) -> set[str]:
    """What a complete map lists."""
    found: set[str] = set()
    for package in OURS:
        for path in (root / package).rglob("*"):
            if path.suffix not in (".py", ".json") or "results" in path.parts:
                continue
            relative = path.relative_to(root)
            found |= {f"{folder}/" for folder in map(str, relative.parents) if folder != "."}
            if package in CODE:
                found.add(str(relative))
    return found


def differences(root: Path, readme: str) -> list[str]:
    listed = read_map(readme)
    inside = {path for path in listed if path.split("/")[0] in OURS}
    twice = {path for path in listed if listed.count(path) > 1}
    wanted = tree(root)
    return sorted(
        [f"{path} is on the map twice" for path in twice]
        + [f"{path} is on the map only" for path in listed if not _exists(root, path)]
        + [f"{path} is missing from the map" for path in wanted - inside]
    )


def _exists(root: Path, path: str) -> bool:
    return (root / path).is_dir() if path.endswith("/") else (root / path).is_file()


def test_map_equals_the_tree() -> None:
    assert differences(ROOT, (ROOT / "README.md").read_text()) == []


SMALL = f"""# x
{HEADING}

    jaxserve/        the server
      __init__.py    nothing
      cli/           the command
        main.py      all of it
    tests/           mirror
    Makefile         make

## Next
    other.py         not on the map
"""


@pytest.fixture
def small(tmp_path: Path) -> Path:
    for path in ("jaxserve/__init__.py", "jaxserve/cli/main.py", "tests/test_x.py", "Makefile"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    return tmp_path


def test_right_map_passes(small: Path) -> None:
    (small / "jaxserve/__pycache__").mkdir()
    (small / "jaxserve/__pycache__/x.pyc").touch()
    assert differences(small, SMALL) == []


def test_wrong_maps_fail(small: Path) -> None:
    (small / "jaxserve/cli/new.py").touch()
    (small / "tests/kernels").mkdir()
    (small / "tests/kernels/test_y.py").touch()
    (small / "Makefile").unlink()
    assert differences(small, SMALL.replace("    tests/", "    tests/  again\n    tests/")) == [
        "Makefile is on the map only",
        "jaxserve/cli/new.py is missing from the map",
        "tests/ is on the map twice",
        "tests/kernels/ is missing from the map",
    ]
    with pytest.raises(AssertionError, match="no description"):
        read_map(SMALL.replace("all of it", ""))


def run_example(number: int) -> dict[str, Any]:
    """As a reader would paste it."""
    examples = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(examples) == 3
    names: dict[str, Any] = {}
    exec(compile(examples[number], "README.md", "exec"), names)
    return names


def test_the_example_of_generation_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    golden.write_checkpoint("qwen3", tmp_path / "my-model")
    monkeypatch.chdir(tmp_path)
    # Compiled programs go where the user has decided, here: nowhere.
    monkeypatch.setattr(program_store, "open_store", lambda *_: None)
    names = run_example(0)
    batch = names["batch"]
    assert batch.tokens.shape == batch.logprobs.shape == (2, 1, 8)
    # Row by row what `generate` gave before it for the same seed; the log-probabilities are those that `score` gives.
    first = names["llm"].generate([[1, 5, 9], [2, 7]], names["params"])
    for row, output in enumerate(first):
        made = output.outputs[0].token_ids
        assert np.asarray(batch.tokens)[row, 0, : len(made)].tolist() == made
        [scores] = names["llm"].score([*output.prompt_token_ids, *made])
        np.testing.assert_allclose(np.asarray(batch.logprobs)[row, 0, : len(made)], scores[-len(made) :], atol=1e-4)


def test_the_example_of_a_model_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    golden.write_checkpoint("qwen3", tmp_path / "my-model")
    monkeypatch.chdir(tmp_path)
    names = run_example(1)
    assert names["logits"].shape == (1, 5, names["spec"].vocab_size)
    grad = names["grads"]["layers"][0]["attention"]["q"]["kernel"]
    assert np.isfinite(grad).all() and np.abs(grad).max() > 0


def test_the_example_of_kernels_runs() -> None:
    """Its rows are those of a pool in which only the new tokens are not zero."""
    names = run_example(2)
    out = np.asarray(names["out"])
    assert out.shape == (6, 8, 64)
    # The decode row sees 39 zero keys and one of ones, whose logit is 64 / sqrt(64).
    np.testing.assert_allclose(out[0], np.exp(8.0) / (np.exp(8.0) + 39), rtol=1e-6)
    np.testing.assert_allclose(out[1:], 1.0, rtol=1e-6)
    assert float(names["k_pool"].sum()) == 6 * 2 * 64
