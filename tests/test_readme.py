# SPDX-License-Identifier: Apache-2.0
"""READMEs are correct: examples run, links work, generated parts are current. Modules have docstrings."""

import ast
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxserve import LLM, SamplingParams, demo
from jaxserve.engine.execute import program_store
from tests import readmes
from tests.golden import load as golden
from tests.golden import pooled

ROOT = Path(__file__).parents[1]
CODE = ("jaxserve", "pallas_kernels", "convert", "benchmarks")
DEFINITIONS = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
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


def test_the_first_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200


def test_generated_parts_are_current() -> None:
    stale = [name for name in readmes.READMES if readmes.renewed(readmes.read(name)) != readmes.read(name)]
    assert not stale, "run python -m tests.readmes"


def test_links_lead_somewhere() -> None:
    for name in readmes.READMES:
        for link in re.findall(r"\]\(([^)#]+)[^)]*\)", readmes.read(name)):
            assert link.startswith("https://") or (ROOT / name).parent.joinpath(link).exists(), f"{name}: {link}"


def test_named_functions_exist() -> None:
    """`folder/file.py:name`, from jaxserve/ or from the root."""
    named = re.findall(r"`([\w/]+\.py):([\w.]+)`", "".join(map(readmes.read, readmes.READMES)))
    assert named
    for path, name in named:
        file = next(file for file in (ROOT / "jaxserve" / path, ROOT / path) if file.exists())
        inside = ast.parse(file.read_text()).body
        for part in name.split("."):
            found = [node for node in inside if isinstance(node, DEFINITIONS) and node.name == part]
            assert found, f"{path} has no {name}"
            inside = found[0].body


def test_the_table_of_folders_is_complete() -> None:
    rows = re.findall(r"^\| (`\w+[/.].*?) \|", readmes.read("jaxserve/README.md"), re.MULTILINE)
    named = set(re.findall(r"`([\w/.]+)`", " ".join(rows)))
    here = {path.name + "/" * path.is_dir() for path in (ROOT / "jaxserve").iterdir() if path.name != "__pycache__"}
    assert {path for path in here if path.endswith("/")} <= named <= here


def test_pictures_are_small() -> None:
    assert all(path.stat().st_size < 300_000 for path in (ROOT / "benchmarks" / "pictures").iterdir())


def run_example(readme: str, *, mentions: str) -> dict[str, Any]:
    """Run the README's only example with this word as a reader would; return the names that it defines."""
    [example] = [each for each in readmes.examples(readme) if mentions in each]
    names: dict[str, Any] = {}
    exec(compile(example, readme, "exec"), names)
    return names


def test_every_example_is_run() -> None:
    elsewhere = "pallas_kernels/README.md"  # tests/pallas_kernels/test_readme.py runs them all
    counts = {name: len(readmes.examples(name)) for name in readmes.READMES if name != elsewhere}
    assert {name: count for name, count in counts.items() if count} == {
        "README.md": 4,
        "jaxserve/README.md": 1,
        "convert/README.md": 1,
    }


@pytest.fixture
def my_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that examples load. No compiled programs are stored."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(program_store, "open_store", lambda *_: None)
    return tmp_path / "my-model"


def test_the_example_of_python_runs(my_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    my_model.symlink_to(demo.FOLDER)
    run_example("README.md", mentions='"What is 7 + 5?"], params')
    assert "Once upon a time" in capsys.readouterr().out


def test_the_example_of_a_pipeline_runs(my_model: Path) -> None:
    golden.write_checkpoint("qwen3", my_model)
    names = run_example("README.md", mentions="generate_arrays")
    llm, rollout = names["llm"], names["rollout"]
    assert rollout.tokens.shape == rollout.logprobs.shape == (2, 2, 8)
    assert len(names["logprobs"]) == 4
    [output] = llm.generate([[1, 5, 9]], SamplingParams(temperature=0, max_tokens=4, detokenize=False))
    assert output.outputs[0].policy_version == 2
    # The gradient went to every weight, and what the engine now scores with is what the trainer holds.
    ids = [1, 5, 9, *output.outputs[0].token_ids]
    params = names["to_engine_layout"](names["spec"], names["weights"])
    dense = jax.nn.log_softmax(names["forward"](names["spec"], params, np.array([ids], np.int32)))
    expected = np.take_along_axis(np.asarray(dense)[0, :-1], np.array(ids)[1:, None], axis=-1)[:, 0]
    np.testing.assert_allclose(llm.logprobs([ids])[0], expected, atol=1e-4)


def test_the_example_of_embeddings_runs(my_model: Path) -> None:
    pooled.write("embed-mean", my_model)
    names = run_example("jaxserve/README.md", mentions="llm.embed")
    means = [mean / np.linalg.norm(mean) for mean in names["means"]]
    np.testing.assert_allclose(names["embeddings"], means, atol=1e-5)
    assert all(-1 < score < 1 for score in names["scores"]) and len(names["scores"]) == 2


def test_arrays_are_what_generate_and_logprobs_give(my_model: Path) -> None:
    golden.write_checkpoint("qwen3", my_model)
    llm = LLM("my-model", skip_tokenizer_init=True, max_num_seqs=4, max_num_batched_tokens=64, warmup=False)
    params = SamplingParams(temperature=0.8, top_p=0.95, seed=7, max_tokens=8)
    batch = llm.generate_arrays([[1, 5, 9], [2, 7]], params)
    assert batch.tokens.shape == batch.logprobs.shape == (2, 1, 8)
    for row, output in enumerate(llm.generate([[1, 5, 9], [2, 7]], params)):
        made = output.outputs[0].token_ids
        assert np.asarray(batch.tokens)[row, 0, : len(made)].tolist() == made
        [logprobs] = llm.logprobs([*output.prompt_token_ids, *made])
        np.testing.assert_allclose(np.asarray(batch.logprobs)[row, 0, : len(made)], logprobs[-len(made) :], atol=1e-4)


def test_the_example_of_a_model_runs(my_model: Path) -> None:
    golden.write_checkpoint("qwen3", my_model)
    names = run_example("convert/README.md", mentions="load_model")
    assert names["logits"].shape == (1, 5, names["spec"].vocab_size)
    grad = names["grads"]["layers"][0]["attention"]["q"]["kernel"]
    assert np.isfinite(grad).all() and np.abs(grad).max() > 0


def test_the_example_of_kernels_runs() -> None:
    """The example's rows read a pool in which all except the new tokens is zero."""
    names = run_example("README.md", mentions="pallas_kernels")
    out = np.asarray(names["out"])
    assert out.shape == (6, 8, 64)
    # The decode row sees 39 zero keys and one of ones, whose logit is 64 / sqrt(64).
    np.testing.assert_allclose(out[0], np.exp(8.0) / (np.exp(8.0) + 39), rtol=1e-6)
    np.testing.assert_allclose(out[1:], 1.0, rtol=1e-6)
    assert float(names["k_pool"].sum()) == 6 * 2 * 64
