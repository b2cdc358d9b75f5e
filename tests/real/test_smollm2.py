# SPDX-License-Identifier: Apache-2.0
"""A real model from a GGUF file: its tokenizer, its texts, and what it answers. `make real-model` fetches it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from convert.gguf import folder as folders
from jaxserve.text import tokenizer as tokenizers
from jaxserve.text.tokenizer import Tokenizer
from tests.real.chats import EXPECTED, FILE, PROMPTS, QUESTIONS, TEXTS

pytestmark = [
    pytest.mark.real,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not FILE.exists(), reason=f"there is no {FILE}: `make real-model` fetches it"),
]
ROOT = Path(__file__).parents[2]
WANTED: dict[str, Any] = json.loads(EXPECTED.read_text())


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return tokenizers.load(folders.of(FILE))


@pytest.fixture(scope="module")
def outputs() -> list[dict[str, Any]]:
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    command = [sys.executable, "-m", "tests.real.answer"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=560)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_token_ids_are_those_of_transformers(tokenizer: Tokenizer) -> None:
    for text in TEXTS:
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert ids == WANTED["texts"][text]
        assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_greedy_texts_are_those_of_transformers(outputs: list[dict[str, Any]]) -> None:
    """Which decodes the blocks by itself, and computes in float32 too."""
    found = [output["ids"] for output in outputs[: len(PROMPTS)]]
    assert found == [WANTED["greedy"][prompt] for prompt in PROMPTS]


def test_answers_are_sensible(outputs: list[dict[str, Any]]) -> None:
    texts = [output["text"] for output in outputs[len(PROMPTS) :]]
    wrong = {
        question: text
        for (question, words), text in zip(QUESTIONS.items(), texts, strict=True)
        if not any(word in text for word in words)
    }
    assert len(wrong) <= 3, wrong
