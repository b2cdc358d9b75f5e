# SPDX-License-Identifier: Apache-2.0
"""The golden files are complete and small, and the weights' generator has not changed."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from transformers import AutoTokenizer

from convert.files.safetensors import read_checkpoint
from tests.golden import load, weights
from tests.golden.cases import CASES

LIMIT = 3_000_000  # bytes of everything but the quantized checkpoints
QUANTIZED_LIMIT = 1_500_000  # whole checkpoints: no seed gives the codes that other packages computed


def test_cases_and_files_agree() -> None:
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names)
    assert load.cases() == sorted(names)
    assert sorted(file.stem for file in load.DATA.glob("*.json")) == sorted(names)


def test_everything_recorded_is_small() -> None:
    quantized = _bytes(load.DATA / "quantized")
    assert quantized < QUANTIZED_LIMIT
    assert _bytes(load.DATA) - quantized < LIMIT


def _bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_case_is_whole(case: Any) -> None:
    golden = load.read(case.name)
    vocab = golden.config.get("vocab_size") or golden.config["text_config"]["vocab_size"]
    assert golden.case == case.name
    assert golden.rules == case.rules
    assert golden.logits.shape == (case.prompt, vocab)
    assert golden.logits.dtype == np.float32
    assert np.isfinite(golden.logits).all()
    assert len(golden.prompt) == case.prompt
    assert len(golden.greedy_prompt) == case.greedy_prompt
    assert len(golden.greedy) == 32
    assert {*golden.prompt, *golden.greedy_prompt, *golden.greedy} <= set(range(vocab))
    assert len(set(golden.greedy)) >= 6
    if case.hub:
        assert golden.config == case.config
    else:
        assert golden.config["model_type"] == case.config["model_type"]


# Every golden file rests on these bytes. Should one change, weights.py did, or numpy broke its word.
@pytest.mark.parametrize(
    ("name", "shape", "digest"),
    [
        ("model.embed_tokens.weight", (96, 64), "b8ca3bfa33c9b8fc"),
        ("model.layers.0.self_attn.q_proj.weight", (64, 64), "86339583d9be0a51"),
        ("model.layers.1.input_layernorm.weight", (64,), "628d0ac57740c0f8"),
        ("model.layers.0.mlp.gate.weight", (6, 64), "27f8e5483807b12b"),
        ("model.layers.0.mlp.experts.gate_up_proj", (4, 64, 192), "3807d02db4f20c3c"),
        ("model.layers.0.self_attn.q_proj.bias", (64,), "06aa43b44df3ed1d"),
        ("attention.masked_bias", (), "af9ca275eecdbc7e"),
    ],
)
def test_weights_are_stable(name: str, shape: tuple[int, ...], digest: str) -> None:
    values = weights.tensor(7, name, shape, weights.Rules())
    assert values.shape == shape
    assert hashlib.sha256(values.astype("<f4").tobytes()).hexdigest()[:16] == digest


def test_rules() -> None:
    rules = weights.Rules(gains={"a": 0.5}, centres={"norm": 0.0}, zeros={"b": [1]}, copies={"b": "a"})
    plain = weights.tensor(1, "a", (4, 3), weights.Rules())
    assert np.array_equal(weights.tensor(1, "a", (4, 3), rules), plain * 0.5)
    assert np.array_equal(weights.tensor(1, "b", (4, 3), rules), plain * 0.5)
    zeroed = weights.tensor(1, "b", (4, 3), weights.Rules(zeros={"b": [1, 2]}))
    assert not zeroed[1:3].any() and zeroed[[0, 3]].all()
    assert abs(weights.tensor(1, "norm.weight", (64,), rules).mean()) < 0.2


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("case", ["mixtral-hub", "gpt-neox-hub", "gpt-oss-hub"])
def test_checkpoint_round_trip(case: str, dtype: str, shards: int, tmp_path: Path) -> None:
    golden = load.read(case)
    load.write_checkpoint(case, tmp_path, dtype, shards)
    assert json.loads((tmp_path / "config.json").read_text()) == golden.config
    found = read_checkpoint(tmp_path)
    assert {name: info.shape for name, info in found.items()} == golden.tensors
    code = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}[dtype]
    assert {info.dtype for info in found.values()} == {code}
    assert len({info.file for info in found.values()}) == shards
    for file in tmp_path.glob("*.safetensors"):
        for name, values in load_file(file).items():
            want = golden.tensor(name)
            # float16 loses the smallest values, which bfloat16 holds; nothing else loses any.
            near = np.spacing(np.float16(0)) if dtype == "float16" else 0
            assert np.abs(values.astype(np.float32) - want).max() <= near, name


def test_tokenizers() -> None:
    expected = json.loads((load.TOKENIZERS / "expected.json").read_text())
    assert sorted(expected) == ["byte-fallback", "byte-level"]
    for kind, content in expected.items():
        tokenizer: Any = AutoTokenizer.from_pretrained(load.TOKENIZERS / kind)
        for text in content["texts"]:
            assert tokenizer(text["text"]).input_ids == text["ids"], text
            assert tokenizer.decode(text["ids"]) == text["decoded"]
            assert tokenizer.decode(text["ids"], skip_special_tokens=True) == text["decoded_without_special"]
        rendered = tokenizer.apply_chat_template(content["messages"], tokenize=False, add_generation_prompt=True)
        assert rendered == content["rendered"]
        chat = tokenizer.apply_chat_template(content["messages"], add_generation_prompt=True, return_dict=True)
        assert chat["input_ids"] == content["chat_ids"]
