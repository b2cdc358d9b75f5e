# SPDX-License-Identifier: Apache-2.0
"""Embeddings, classes and scores of tiny models against sentence-transformers and transformers."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from convert.command import Convert
from convert.load import open_model
from jaxserve import LLM
from jaxserve.config import ConfigError
from jaxserve.errors import CheckpointError, JaxserveError, RequestError
from jaxserve.frontend import pooling_files
from jaxserve.frontend.pooling import Pooling
from jaxserve.text import tokenizer as tokenizers
from tests.fast import programs
from tests.golden import load as golden
from tests.golden.pooled import CASES, EXPECTED, MEAN, PAIRS, POOLING, TEXTS, Pooled, write

OPTIONS: dict[str, Any] = dict(
    max_num_seqs=2, max_num_batched_tokens=16, max_model_len=64, num_blocks=17, block_size=8, warmup="none"
)


@pytest.mark.parametrize("case", CASES)
def test_outputs_are_those_of_sentence_transformers(case: str, tmp_path: Path) -> None:
    folder = write(case, tmp_path / "model")
    wanted = json.loads(EXPECTED.read_text())[case]
    llm = LLM(model=str(folder), compilation_cache_dir=programs(), **OPTIONS)
    with pytest.raises(RequestError, match="no language-model head: it cannot generate"):
        llm.generate("x", use_tqdm=False)
    for _ in range(2):  # the second time prompts are cached
        check(llm, CASES[case], wanted)


@pytest.mark.parametrize("case", ["embed-mean-dense", "classify", "rerank", "embed-cls"])
def test_converted_models_give_the_same(case: str, tmp_path: Path) -> None:
    """Also after a second conversion."""
    folder, once, twice = write(case, tmp_path / "model"), tmp_path / "once", tmp_path / "twice"
    Convert(str(folder), once).run()
    Convert(str(once), twice).run()
    assert not list(twice.glob("*.safetensors"))
    llm = LLM(model=str(twice), compilation_cache_dir=programs(), **OPTIONS)
    check(llm, CASES[case], json.loads(EXPECTED.read_text())[case])


def check(llm: LLM, pooled: Pooled, wanted: list[list[float]]) -> None:
    if pooled.labels == 1:
        scores = llm.score(*zip(*PAIRS, strict=True), use_tqdm=False)
        np.testing.assert_allclose(scores, np.ravel(wanted), atol=1e-5)
    elif pooled.labels:
        classes = llm.classify(TEXTS, use_tqdm=False)
        np.testing.assert_allclose([each.probs for each in classes], wanted, atol=1e-5)
        names = pooled.config["id2label"]
        assert [each.label for each in classes] == [names[str(np.argmax(right))] for right in wanted]
    else:
        embeddings = llm.embed(TEXTS, use_tqdm=False)
        np.testing.assert_allclose(embeddings, wanted, atol=1e-5)
        unit = np.array([np.array(right) / np.linalg.norm(right) for right in wanted])
        np.testing.assert_allclose(llm.score(TEXTS[0], TEXTS, use_tqdm=False), unit @ unit[0], atol=1e-4)


def test_a_folder_without_files_for_embeddings() -> None:
    assert pooling_files.pooling_of(None, None) == Pooling()


def test_dimensions_of_matryoshka_models(tmp_path: Path) -> None:
    vector = np.arange(1, 9, dtype=np.float32)
    short = Pooling().embedding(vector, dimensions=3)
    np.testing.assert_allclose(short, [1, 2, 3] / np.sqrt(14), rtol=1e-6)
    for config, dimensions in (({}, ()), ({"is_matryoshka": True}, None), ({"matryoshka_dimensions": [2, 4]}, (2, 4))):
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert pooling_files.load(tmp_path).dimensions == dimensions


@pytest.mark.parametrize(
    ("modules", "config", "problem"),
    [
        (["Transformer", "Pooling"], {"pooling_mode_max_tokens": True}, "pooling mode is max_tokens, and only"),
        (["Transformer", "Pooling"], {"pooling_mode": "max"}, "only lasttoken, cls, mean, weightedmean are supported"),
        (["Transformer", "Pooling"], {"pooling_mode": ["cls", "mean"]}, "pooling mode is cls and mean, and"),
        (["Transformer", "Pooling"], MEAN | {"pooling_mode_cls_token": True}, "is cls_token and mean_tokens, and"),
        (["Transformer", "Pooling"], {}, "pooling mode is not set"),
        (["Transformer", "Pooling", "LSTM"], POOLING, "a module LSTM"),
        (["Transformer", "Pooling", "Normalize", "Dense"], POOLING, "a Dense module after normalization"),
    ],
)
def test_what_is_not_supported_is_named(
    modules: list[str], config: dict[str, Any], problem: str, tmp_path: Path
) -> None:
    folder = write("embed-dense", tmp_path / "model")
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(config))
    places = {"Transformer": "", "Dense": "2_Dense"}
    content = [
        {"type": f"sentence_transformers.models.{kind}", "path": places.get(kind, "1_Pooling")} for kind in modules
    ]
    (folder / "modules.json").write_text(json.dumps(content))
    assert problem in (pooling_files.load(folder).unsupported or "")


@pytest.mark.parametrize(
    ("config", "pool"),
    [
        (POOLING, "last"),
        (MEAN, "mean"),
        ({"pooling_mode": "cls"}, "first"),
        ({"pooling_mode": ["weightedmean"]}, "weighted_mean"),
        ({"embedding_dimension": 64}, "mean"),  # sentence-transformers' default
    ],
)
def test_pooling_modes(config: dict[str, Any], pool: str, tmp_path: Path) -> None:
    folder = write("embed", tmp_path / "model")
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(config))
    found = pooling_files.load(folder)
    assert (found.pool, found.unsupported) == (pool, None)


def test_bad_files_are_errors(tmp_path: Path) -> None:
    folder = write("embed-dense", tmp_path / "model")
    config = folder / "2_Dense" / "config.json"
    config.write_text(json.dumps({"activation_function": "torch.nn.modules.activation.Weird"}))
    with pytest.raises(CheckpointError, match=r"asks for the activation Weird; supported: identity, sigmoid"):
        pooling_files.load(folder)
    config.write_text("[")
    with pytest.raises(CheckpointError, match=r"config.json is not valid JSON"):
        pooling_files.load(folder)
    (folder / "modules.json").write_text(json.dumps([{"type": "x.Dense", "path": "../elsewhere"}]))
    with pytest.raises(CheckpointError, match=r"has the path ../elsewhere"):
        pooling_files.load(folder)
    classifier = write("classify", tmp_path / "classifier")
    Convert(str(classifier), tmp_path / "converted").run()
    (tmp_path / "converted" / "score" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="score: contains no safetensors checkpoint"):
        pooling_files.load(tmp_path / "converted")
    (classifier / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no safetensors checkpoint"):
        pooling_files.load(classifier)


def test_a_score_from_two_tokens(tmp_path: Path) -> None:
    """The probability of the second token, if there were no others."""
    folder = write("rerank", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config |= {"architectures": ["Qwen3ForCausalLM"], "tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = tokenizers.load(folder)
    found = pooling_files.pooling_of(str(folder), tokenizer, ("a", "b"))
    assert found.classifier is not None and found.classifier.scores
    hidden = np.linspace(-1, 1, config["hidden_size"]).astype(np.float32)
    rows = pooling_files._values(pooling_files.read_checkpoint(folder)["model.embed_tokens.weight"])
    no, yes = (float(rows[tokenizer.encode(word, add_special_tokens=False)[0]] @ hidden) for word in "ab")
    assert found.probabilities(hidden)[0] == pytest.approx(np.exp(yes) / (np.exp(yes) + np.exp(no)), rel=1e-5)
    with pytest.raises(ConfigError, match=r"classifier_from_token has 'two words', which is \d+ tokens"):
        pooling_files.pooling_of(str(folder), tokenizer, ("a", "two words"))
    with pytest.raises(ConfigError, match="classifier_from_token has 1 tokens"):
        pooling_files.pooling_of(str(folder), tokenizer, ("a",))


@pytest.mark.parametrize("case", ["qwen3", "llama-gqa-tied"])
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_a_score_from_two_tokens_of_a_converted_model(case: str, dtype: Any, tmp_path: Path) -> None:
    folder, converted = tmp_path / "model", tmp_path / "converted"
    golden.write_checkpoint(case, folder)
    Convert(str(folder), converted, dtype=dtype).run()
    wanted, found = (pooling_files.load(place, tokens=(5, 7)).classifier for place in (folder, converted))
    assert wanted is not None and found is not None
    np.testing.assert_allclose(found.layer.weight, wanted.layer.weight, atol=0.01 if dtype else 0)
    assert np.abs(wanted.layer.weight).max() > 0.05


def test_attention_to_later_tokens_is_refused(tmp_path: Path) -> None:
    folder = write("embed", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"is_causal": False}))
    with pytest.raises(JaxserveError, match="is_causal = false: attention to later tokens is not supported"):
        open_model(folder)
