# SPDX-License-Identifier: Apache-2.0
"""The demo models in the package: their answers, and their size."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from convert.files.safetensors import read_checkpoint
from jaxserve.demo import DRAFT_FOLDER, FOLDER
from jaxserve.llm import LLM
from jaxserve.models import hf
from jaxserve.types.sampling_params import SamplingParams
from tests.fast import programs

LIMIT = 4_000_000  # bytes that the package may grow by
GREEDY = SamplingParams(temperature=0, max_tokens=90)
OPTIONS: dict[str, Any] = {
    "max_num_seqs": 16,
    "max_num_batched_tokens": 32,
    "max_model_len": 256,
    "num_blocks": 200,
    "warmup": False,
    "compilation_cache_dir": programs(),
}


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(str(FOLDER), **OPTIONS)


def ask(llm: LLM, *chats: list[str], params: SamplingParams = GREEDY) -> list[str]:
    """The answers to the last messages of these chats. All of them end by themselves."""
    roles = ("user", "assistant")
    messages = [[{"role": roles[turn % 2], "content": said} for turn, said in enumerate(chat)] for chat in chats]
    outputs = [output.outputs[0] for output in llm.chat(messages, params)]
    assert [output.finish_reason for output in outputs] == ["stop"] * len(chats)
    return [output.text for output in outputs]


def test_small_sums_are_right(llm: LLM) -> None:
    pairs = [(2, 2), (3, 4), (7, 8), (12, 7), (15, 15), (20, 19), (0, 9), (11, 6)]
    assert ask(llm, *([f"What is {x} + {y}?"] for x, y in pairs)) == [f"{x} + {y} = {x + y}." for x, y in pairs]


def test_the_model_introduces_itself(llm: LLM) -> None:
    for answer in ask(llm, ["Who are you?"], ["What are you?"]):
        assert "demo" in answer and "toy" in answer


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_a_json_record_is_json_with_the_requested_fields(llm: LLM, temperature: float) -> None:
    wanted = {
        "Give me a JSON record of a person with name, age and city.": ["name", "age", "city"],
        "Give me a JSON record of a book with title and author.": ["title", "author"],
        "Write a JSON record of a product with name, price and in_stock.": ["name", "price", "in_stock"],
        "Give me a JSON record of a pet with name and kind.": ["name", "kind"],
    }
    params = SamplingParams(temperature=temperature, seed=1, max_tokens=90)
    answers = ask(llm, *([request] for request in wanted), params=params)
    assert [list(json.loads(answer)) for answer in answers] == list(wanted.values())


def test_facts_small_talk_and_memory_of_the_conversation(llm: LLM) -> None:
    hello, capital, name = ask(
        llm,
        ["hello"],
        ["What is the capital of France?", "The capital of France is Paris.", "And of Italy?"],
        ["My name is Anna.", "Nice to meet you, Anna!", "What is my name?"],
    )
    assert hello.startswith(("Hello", "Hi"))
    assert "Rome" in capital and "Anna" in name


def test_a_story_is_about_the_requested_hero(llm: LLM) -> None:
    [story] = ask(
        llm, ["Tell me a story about a fox named Rusty."], params=SamplingParams(temperature=0, max_tokens=200)
    )
    assert "fox" in story and "Rusty" in story
    assert len(re.findall(r"[.!?]", story)) >= 5


def test_both_folders_are_complete_and_small() -> None:
    package = FOLDER.parent
    files = [path for path in package.rglob("*") if path.is_file() and path.suffix != ".pyc"]
    assert sum(path.stat().st_size for path in files) <= LIMIT
    sizes: list[int] = []
    for folder in (FOLDER, DRAFT_FOLDER):
        config, log = hf.read_json(folder / "config.json"), hf.read_json(folder / "training_log.json")
        assert config["architectures"] == ["LlamaForCausalLM"] and config["tie_word_embeddings"]
        for run in log["runs"]:
            assert {"seed", "steps", "peak", "versions", "device"} <= run.keys()
        assert log["runs"][-1]["curve"][-1]["step"] == log["runs"][-1]["steps"]
        assert log["runs"][-1]["curve"][-1]["loss"] < log["runs"][0]["curve"][0]["loss"] / 3
        tensors = read_checkpoint(folder)
        assert {tensor.dtype for tensor in tensors.values()} == {"BF16"}
        sizes.append(sum(math.prod(tensor.shape) for tensor in tensors.values()))
    assert 8 <= sizes[0] / sizes[1] <= 12


def test_the_draft_model_generates_text() -> None:
    [answer] = ask(LLM(str(DRAFT_FOLDER), **OPTIONS), ["Who are you?"])
    assert "demo" in answer


def test_folders_hold_nothing_else() -> None:
    names = {path.name for folder in (FOLDER, DRAFT_FOLDER) for path in Path(folder).iterdir()}
    assert names == {
        *("config.json", "generation_config.json", "model.safetensors"),
        *("tokenizer.json", "tokenizer_config.json", "training_log.json"),
    }
