# SPDX-License-Identifier: Apache-2.0
"""AWQ and GPTQ: the methods against plain formulas, what folding leaves equal, and checkpoints better than nearest."""

import json
import math
import re
from pathlib import Path
from random import Random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.demo import corpus
from convert import load
from convert.files.reader import Reader
from convert.quantize import awq, calibrated, calibration, gptq
from convert.quantize.checkpoint import PlainModel
from convert.quantize.layers import Layers, LayerWeights
from jaxserve import cli, demo
from jaxserve.models.spec import Moe
from jaxserve.quant import rounding, schemes
from jaxserve.quant.scheme import Scheme
from tests.golden import load as golden
from tests.quant.test_online import FORWARD, values

SCHEME = schemes.in_groups(bits=4, group=32, scales="bfloat16", zeros="uint8")


def problem(rows: int = 24, columns: int = 96) -> tuple[np.ndarray, np.ndarray]:
    """A matrix, and inputs that depend on each other, some of which are large."""
    random = np.random.default_rng(1)
    mixed = random.standard_normal((columns, columns)) * np.exp(random.standard_normal(columns))
    x = random.standard_normal((400, columns)) @ mixed
    x[:, 7] = 0
    return random.standard_normal((rows, columns)).astype(np.float32), x.astype(np.float32)


def loss(found: np.ndarray, weight: np.ndarray, x: np.ndarray) -> float:
    return float(np.square(x.astype(np.float64) @ (found - weight).T.astype(np.float64)).sum())


def nearest(weight: np.ndarray, scheme: Scheme = SCHEME) -> np.ndarray:
    return values(rounding.encode("groups", scheme, jnp.asarray(weight)), scheme)


def plain_gptq(weight: np.ndarray, gram: np.ndarray) -> np.ndarray:
    """The definition: after each column, the others change by the optimal step, and it leaves the inverse of H."""
    left = weight.astype(np.float64)
    dead = np.diag(gram) == 0
    left[:, dead] = 0
    inverse = np.linalg.inv(gram + np.diag(dead) + 0.01 * np.mean(np.diag(gram)) * np.eye(len(gram)))
    found = np.zeros(left.shape)
    for k in range(left.shape[1]):
        if k % 32 == 0:
            part = left[:, k : k + 32]
            low, high = np.minimum(part.min(1), 0), np.maximum(part.max(1), 0)
            step = np.asarray(jnp.asarray((high - low) / 15, jnp.bfloat16), np.float64)
            zero = np.clip(np.rint(-low / step), 0, 15)
        found[:, k] = (np.clip(np.rint(left[:, k] / step) + zero, 0, 15) - zero) * step
        error = (left[:, k] - found[:, k]) / inverse[k, k]
        left[:, k:] -= error[:, None] * inverse[k, k:]
        inverse -= np.outer(inverse[:, k], inverse[k]) / inverse[k, k]
    return found


def test_gptq_is_its_definition() -> None:
    weight, x = problem()
    gram = x.T.astype(np.float64) @ x
    found = values(dict(gptq.components(weight, gram, SCHEME)), SCHEME)
    wanted = plain_gptq(weight, gram)
    # A value half-way between two codes may go either way, and the columns after it follow.
    assert np.mean(np.abs(found - wanted) > 1e-4) < 0.05
    assert loss(found, weight, x) == pytest.approx(loss(wanted, weight, x), rel=0.02)
    assert loss(found, weight, x) < 0.5 * loss(nearest(weight), weight, x)


def test_awq_narrows_ranges_where_that_pays() -> None:
    weight, x = problem()
    gram = (x.T.astype(np.float64) @ x).astype(np.float32)
    found = values(dict(awq.components(weight, gram, SCHEME)), SCHEME)
    blocks = np.kron(np.eye(3), np.ones((32, 32)))  # what the search looks at: each group alone
    errors = [np.sum((each - weight) @ (gram * blocks) * (each - weight)) for each in (found, nearest(weight))]
    assert errors[0] < 0.95 * errors[1]


# --- layers -----------------------------------------------------------------------------------------------------------


def opened(case: str, folder: Path, *, length: int = 16) -> tuple[PlainModel, np.ndarray]:
    source = golden.write_checkpoint(case, folder)
    model = PlainModel.open(source, load.open_model(source).in_dtype("float32"), "awq")
    tokens = np.random.default_rng(0).integers(0, model.plan.spec.vocab_size, (3, length), np.int32)
    return model, tokens


CASES = ("llama-gqa-tied", "gemma3", "cohere", "phi3", "qwen2-moe", "deepseek-v3")


@pytest.mark.parametrize("case", CASES)
def test_layers_are_the_model_and_folding_changes_nothing(tmp_path: Path, case: str) -> None:
    model, tokens = opened(case, tmp_path)
    logits = np.asarray(FORWARD(model.plan.spec, load.read(model.plan), jnp.asarray(tokens)))
    with Reader() as reader:
        layers, states = Layers(model, reader, tokens.shape[1]), np.zeros(0)
        for number in range(len(model.plan.spec.layers)):
            weights = LayerWeights(model, reader, number)
            states = layers.enter(tokens, weights) if number == 0 else states
            params = layers.params(weights)
            notes = jax.tree.map(np.asarray, layers.observe(number, params, states))
            after = layers.run(number, params, states)
            before = {name: array.copy() for name, array in weights.arrays.items()}
            inputs: awq.Inputs = {
                name: calibrated.statistics(notes, *where) for name, where in layers.inputs_of(weights).items()
            }
            awq.scale(weights, inputs, model.chosen, model.stored)
            changed = {name for name, array in weights.arrays.items() if not np.array_equal(array, before[name])}
            assert len(changed) > 3, changed
            scaled = layers.run(number, layers.params(weights), states)
            np.testing.assert_allclose(scaled, after, atol=2e-5 * np.ptp(after))
            states = after
        assert layers.perplexity(states, tokens) == pytest.approx(perplexity(logits, tokens), rel=1e-4)


@pytest.mark.parametrize("case", ["llama-gqa-tied", "qwen3-moe"])
def test_statistics_are_those_of_the_inputs(tmp_path: Path, case: str) -> None:
    """Of q: the normed states. Of experts: as many rows as tokens choose, and all together as of one matrix."""
    model, tokens = opened(case, tmp_path)
    with Reader() as reader:
        layers, weights = Layers(model, reader, tokens.shape[1]), LayerWeights(model, reader, 0)
        states = layers.enter(tokens, weights)
        notes = jax.tree.map(np.asarray, layers.observe(0, layers.params(weights), states))
        wide = states.reshape(-1, states.shape[-1]).astype(np.float64)
        norm, mlp = weights.layer.attention_in, weights.layer.mlp
        assert norm is not None
        normed = wide / np.sqrt(np.square(wide).mean(-1, keepdims=True) + norm.eps)
        normed *= weights.arrays["model.layers.0.input_layernorm.weight"]
        [q] = weights.names[weights.path("attention", "q", "kernel")]
        found = calibrated.statistics(notes, *layers.inputs_of(weights)[q])
        np.testing.assert_allclose(found["gram"], normed.T @ normed, rtol=1e-3, atol=1e-3)
        np.testing.assert_allclose(found["size"], np.abs(normed).sum(0), rtol=1e-4)
        assert found["count"] == len(wide)
        if isinstance(mlp, Moe):
            chosen = mlp.router.top_k * len(wide)
            router = calibrated.statistics(notes, *layers.inputs_of(weights)["model.layers.0.mlp.gate.weight"])
            experts = weights.names[weights.path("mlp", "experts", "gate", "kernel")]
            each = [calibrated.statistics(notes, *layers.inputs_of(weights)[name]) for name in experts]
            assert sum(one["count"] for one in each) == chosen and router["count"] == len(wide)
            total = np.sum([one["gram"] for one in each], axis=0)
            top = mlp.router.top_k
            assert np.trace(total) == pytest.approx(top * np.trace(router["gram"]), rel=1e-4)


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the kind that the demo model was trained on."""
    file, random = tmp_path_factory.mktemp("text") / "text.jsonl", Random(5)
    file.write_text("\n".join(json.dumps({"text": corpus.plain(random)}) for _ in range(60)))
    return file


def convert(source: Path, folder: Path, *words: str | Path) -> None:
    assert cli.main(["convert", str(source), str(folder), *map(str, words)]) == 0


def test_both_lose_less_than_rounding(tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, held = calibration.sequences(text, demo.FOLDER, 2048)
    plain = load.load_model(demo.FOLDER, dtype="float32")
    logits = np.asarray(FORWARD(*plain, jnp.asarray(held)))
    lost: dict[str, float] = {}
    for method in ("int4", "awq", "gptq"):
        more = () if method == "int4" else ("--calibration", text)
        capsys.readouterr()
        convert(demo.FOLDER, tmp_path / method, "--quantize", method, *more)
        said = capsys.readouterr().out
        found = np.asarray(FORWARD(*load.load_model(tmp_path / method, dtype="float32"), jnp.asarray(held)))
        lost[method] = float(np.square(found - logits).mean())
        if more:  # what is reported is what the checkpoint does
            printed = re.search(r"perplexity of ([\d,]+) tokens held out: ([\d.]+) before, ([\d.]+) after", said)
            assert printed and int(printed[1].replace(",", "")) == held.size
            for number, each in ((2, logits), (3, found)):
                assert float(printed[number]) == pytest.approx(perplexity(each, held), rel=1e-3)
    assert lost["awq"] < 0.97 * lost["int4"] and lost["gptq"] < 0.8 * lost["int4"], lost
    sizes = {method: (tmp_path / method / "model.safetensors").stat().st_size for method in lost}
    assert len({*sizes.values()}) == 1, sizes


def perplexity(logits: np.ndarray, tokens: np.ndarray) -> float:
    logprobs = np.asarray(jax.nn.log_softmax(jnp.asarray(logits[:, :-1])))
    return math.exp(-np.take_along_axis(logprobs, tokens[:, 1:, None], -1).mean(dtype=np.float64))


def refused(capsys: pytest.CaptureFixture[str], *words: str | Path) -> str:
    capsys.readouterr()
    assert cli.main(["convert", str(demo.FOLDER), *map(str, words)]) in (1, 2)
    return capsys.readouterr().err


def test_wrong_texts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, file = tmp_path / "out", tmp_path / "text.jsonl"
    said = refused(capsys, out, "--quantize", "awq")
    assert "--quantize awq needs a text  hint: set --calibration" in said and "choose int4" in said
    assert "without --quantize awq or gptq" in refused(capsys, out, "--quantize", "int4", "--calibration", file)
    gptq_with = ("--quantize", "gptq", "--calibration")
    assert "cannot read" in refused(capsys, out, *gptq_with, file)
    file.write_text('{"text": "fine"}\n{"words": 3}\n')
    assert "text.jsonl, line 2 is not a text  hint: expected" in refused(capsys, out, *gptq_with, file)
    file.write_text('"too short"\n')
    assert "tokens, expected at least 288  hint: name a longer text" in refused(capsys, out, *gptq_with, file)
    file.write_text("\n")
    assert "text.jsonl is empty  hint: name a text" in refused(capsys, out, *gptq_with, file)
    file.write_bytes(b"\xff\xfe\x00")
    assert "is not a text in UTF-8" in refused(capsys, out, *gptq_with, file)
    assert not out.exists()
