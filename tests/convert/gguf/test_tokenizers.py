# SPDX-License-Identifier: Apache-2.0
"""Tokenizers of GGUF files against the ones whose vocabularies the files have, and faults in them."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Backend

from convert.gguf import folder as folders
from convert.gguf.pre_tokenizers import PATTERNS
from jaxserve.errors import CheckpointError
from jaxserve.text import tokenizer as tokenizers
from tests.convert.gguf import tokens
from tests.convert.gguf.crafted import blob
from tests.convert.gguf.test_models import EMBEDDING, PAIRS
from tests.golden.load import TOKENIZERS

EXPECTED: dict[str, Any] = json.loads((TOKENIZERS / "expected.json").read_text())


def made(tmp_path: Path, pairs: dict[str, Any]) -> Path:
    file = tmp_path / "model.gguf"
    file.write_bytes(blob({**PAIRS, **pairs}, [EMBEDDING], bytes(512)))
    return folders.of(file)


@pytest.mark.parametrize("kind", ["byte-level", "byte-fallback"])
def test_ids_and_texts_are_those_of_the_original(kind: str, tmp_path: Path) -> None:
    tokenizer = tokenizers.load(made(tmp_path, tokens.pairs_of(TOKENIZERS / kind)))
    original = Backend.from_file(str(TOKENIZERS / kind / "tokenizer.json"))
    for text in (case["text"] for case in EXPECTED[kind]["texts"]):
        ids = original.encode(text).ids
        assert tokenizer.encode(text) == ids
        for skip in (True, False):
            assert tokenizer.decode(ids, skip_special_tokens=skip) == original.decode(ids, skip_special_tokens=skip)


def test_the_file_says_what_is_around_a_text(tmp_path: Path) -> None:
    pairs = tokens.pairs_of(TOKENIZERS / "byte-level")
    pairs |= {"tokenizer.ggml.add_bos_token": False, "tokenizer.ggml.add_eos_token": True}
    tokenizer = tokenizers.load(made(tmp_path, pairs))
    assert tokenizer.encode("a")[1:] == [424] and tokenizer.encode("a")[0] < 420
    assert tokenizer.encode_pair("a", "a") == tokenizer.encode("a") * 2


def test_chat_template_and_ends(tmp_path: Path) -> None:
    folder = made(
        tmp_path, tokens.pairs_of(TOKENIZERS / "byte-level", template="{{ messages[0].content }}!{{ bos_token }}")
    )
    tokenizer = tokenizers.load(folder)
    assert tokenizer.chat_text([{"role": "user", "content": "hi"}]) == "hi!<|begin_of_text|>"
    # By the file's eos_token_id, and by the text of a control token.
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == [421, 424]


@pytest.mark.parametrize("name", PATTERNS)
def test_every_pre_tokenizer_can_be_built(name: str, tmp_path: Path) -> None:
    tokenizer = tokenizers.load(made(tmp_path, tokens.pairs_of(TOKENIZERS / "byte-level", pre=name)))
    text = "I'll pay 12345 €, 你好 ÅéΣ\r\n  x = y_1;\n\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text


FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "no tokens": ({"tokenizer.ggml.tokens": []}, "has no tokenizer"),
    "two alike": ({"tokenizer.ggml.tokens": ["a", "a"]}, "two tokens with the same text"),
    "few types": ({"tokenizer.ggml.token_type": [1]}, "has 1 token types for 426 tokens"),
    "no model": ({"tokenizer.ggml.model": "bert"}, "has a tokenizer of model 'bert', supported are gpt2 and llama"),
    "unknown splits": ({"tokenizer.ggml.pre": "x"}, "has the unknown pre-tokenizer 'x'"),
    "no splits": ({"tokenizer.ggml.pre": ""}, "has no 'tokenizer.ggml.pre'"),
    "a merge of nothing": ({"tokenizer.ggml.merges": ["a"]}, "has the merge 'a'"),
    "a merge to nothing": ({"tokenizer.ggml.merges": ["z q"]}, "has the merge 'z q'"),
    "types of texts": ({"tokenizer.ggml.token_type": ["a"]}, "expected a list of int"),
    "no scores": ({"tokenizer.ggml.model": "llama"}, "has no 'tokenizer.ggml.scores'"),
}


@pytest.mark.parametrize(("changes", "fault"), FAULTS.values(), ids=FAULTS.keys())
def test_faults_are_those_of_the_tokenizer_alone(changes: dict[str, Any], fault: str, tmp_path: Path) -> None:
    folder = made(tmp_path, {**tokens.pairs_of(TOKENIZERS / "byte-level"), **changes})
    with pytest.raises(CheckpointError) as caught:
        tokenizers.load(folder)
    assert fault in caught.value.problem and "model.gguf" in caught.value.problem
    assert "--tokenizer" in caught.value.hint
