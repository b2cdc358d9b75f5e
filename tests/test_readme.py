# SPDX-License-Identifier: Apache-2.0
"""The README's examples run, and every module says what it owns: there is no separate map of the code to go stale."""

import ast
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxserve.engine.execute import program_store
from tests.golden import load as golden

ROOT = Path(__file__).parents[1]
CODE = ("jaxserve", "pallas_kernels", "convert", "benchmarks")
LEAST = 3  # words of a first sentence beside those of the module's name


def complaint(name: str, source: str) -> str | None:
    """What is wrong with a module's docstring; `name` is dotted."""
    about = ast.get_docstring(ast.parse(source))
    if not about:
        return f"{name} has no docstring"
    first = re.split(r"(?<=\.)\s|\n\n", about, maxsplit=1)[0]
    if first[-1] not in ".:":
        return f"{name}: the docstring does not begin with a sentence: {first!r}"
    words = set(re.findall(r"[\w-]+", first.lower())) - set(re.split(r"[._]", name.lower())) - {"a", "an", "the", "of"}
    return None if len(words) >= LEAST else f"{name}: the docstring says too little: {first!r}"


def test_every_module_says_what_it_owns() -> None:
    files = [path for package in CODE for path in sorted((ROOT / package).rglob("*.py"))]
    assert len(files) > 200
    names = {path: ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in files}
    assert [wrong for path, name in names.items() if (wrong := complaint(name, path.read_text()))] == []


@pytest.mark.parametrize(
    ("source", "wrong"),
    [
        ('"""Gives each sequence its blocks.\n\nMore."""', None),
        ("x = 1", "has no docstring"),
        ('"""The block pool."""', "says too little"),
        ('"""Gives each sequence its blocks"""', "does not begin with a sentence"),
    ],
)
def test_docstrings_that_say_nothing_are_found(source: str, wrong: str | None) -> None:
    found = complaint("jaxserve.engine.block_pool", source)
    assert found is None if wrong is None else wrong in str(found)


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
