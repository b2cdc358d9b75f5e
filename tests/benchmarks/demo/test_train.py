# SPDX-License-Identifier: Apache-2.0
"""The script that made the models, on shapes so small that it takes seconds."""

import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer

from benchmarks.demo import optimizer, packing, shapes, train, vocabulary
from convert.load import load_model
from jaxserve.demo import FOLDER
from jaxserve.models import param_layout
from jaxserve.models.registry import read_config, spec_of
from jaxserve.text import tokenizer as tokenizers

BACKEND = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))


def test_two_steps_write_a_folder_that_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SHORT", "USUAL", "LONG"):
        monkeypatch.setattr(train, name, packing.BatchShape(2, 16, 2))
    monkeypatch.setattr(vocabulary, "train", lambda: BACKEND)
    train.train(tmp_path / "made", train.TrainingPlan(steps=2, seed=5), draft=True)
    spec, _ = load_model(tmp_path / "made")
    assert spec.vocab_size == BACKEND.get_vocab_size() == tokenizers.load(tmp_path / "made").vocab_size
    log = json.loads((tmp_path / "made" / "training_log.json").read_text())
    [run] = log["runs"]
    [point] = run["curve"]
    assert (run["seed"], run["steps"], point["step"], point["tokens"]) == (5, 2, 2, 64)
    assert 6 < point["loss"] < 8  # it knows nothing yet: ln 1280 is 7.15
    train.train(tmp_path / "further", train.TrainingPlan(steps=2, seed=6), draft=True, begin=tmp_path / "made")
    log = json.loads((tmp_path / "further" / "training_log.json").read_text())
    assert log["runs"][0] == run and log["runs"][1]["seed"] == 6


def test_what_is_written_is_what_was_trained(tmp_path: Path) -> None:
    spec = spec_of(shapes.config(BACKEND, draft=True))
    public = train.start(spec, 1)
    shapes.write(tmp_path, BACKEND, public, draft=True)
    assert read_config(tmp_path)[0] == spec
    loaded = dict(param_layout.leaves(param_layout.to_public_layout(spec, load_model(tmp_path, dtype="float32")[1])))
    trained = dict(param_layout.leaves(public))
    assert loaded.keys() == trained.keys()
    for path, value in trained.items():
        np.testing.assert_array_equal(value.astype(jnp.bfloat16).astype(jnp.float32), loaded[path])


def test_a_few_steps_learn_a_batch_by_heart() -> None:
    spec = spec_of(shapes.config(BACKEND, draft=True))
    tokens, weights = map(jnp.asarray, next(packing.batches(BACKEND, packing.BatchShape(2, 16, 2), seed=1)))
    state = optimizer.start(train.start(spec, 1))
    losses: list[float] = []
    for _ in range(100):
        state, loss = train.update(spec, state, tokens, weights, steps=100.0, peak=0.01)
        losses.append(float(loss))
    assert losses[-1] < 0.2 * losses[0]


def test_a_token_that_is_not_to_be_learned_changes_no_loss() -> None:
    spec = spec_of(shapes.config(BACKEND, draft=True))
    tokens, _ = map(jnp.asarray, next(packing.batches(BACKEND, packing.BatchShape(2, 16, 2), seed=1)))
    loss = jax.jit(partial(train.loss_of, spec, train.start(spec, 1)))
    weights = jnp.zeros((2, 16)).at[0, 5].set(1.0)
    assert loss(tokens, weights) == loss(tokens.at[0, 6:].set(9).at[1].set(9), weights)
    assert loss(tokens, weights) != loss(tokens.at[0, 5].set(9), weights)


def test_rows_begin_with_a_document_and_are_full() -> None:
    source = packing.batches(BACKEND, packing.BatchShape(4, 32, 2), seed=2)
    begin = BACKEND.token_to_id(vocabulary.BEGIN)
    for _ in range(5):
        tokens, weights = next(source)
        assert (tokens[:, 0] == begin).all() and (weights[:, 0] == 0).all()
        assert (tokens != BACKEND.token_to_id(vocabulary.PAD)).all() and set(np.unique(weights)) <= {0.0, 1.0}


def test_the_lessons_of_a_training_are_those_of_its_seed() -> None:
    def some(seed: int) -> list[np.ndarray]:
        return [tokens for tokens, _ in train.lessons(BACKEND, train.TrainingPlan(steps=50, seed=seed))]

    first, again, other = some(1), some(1), some(2)
    assert len(first) == 50 and all(np.array_equal(x, y) for x, y in zip(first, again, strict=True))
    assert not all(np.array_equal(x, y) for x, y in zip(first, other, strict=True))
    assert {tokens.shape for tokens in first} == {shape[:2] for shape in (train.SHORT, train.USUAL, train.LONG)}
