# SPDX-License-Identifier: Apache-2.0
"""The tokenizer in the folders: nothing is lost in it, and its template is what the models were trained on."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from benchmarks.demo import packing, vocabulary
from jaxserve.demo import DRAFT_FOLDER, FOLDER
from jaxserve.errors import RequestError
from jaxserve.text import tokenizer as tokenizers
from tests.text.chats import chat_ids

TOKENIZER = tokenizers.load(FOLDER)
CHAT = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "Hello!"},
    {"role": "user", "content": "What is 3 + 4?"},
]


@given(st.text())
def test_any_text_comes_back(text: str) -> None:
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.decode(ids[1:], skip_special_tokens=False) == text
    assert ids[0] == TOKENIZER.encode("")[0]


def test_a_conversation_of_several_turns() -> None:
    text = "<|begin|><|system|>Be kind.<|end|><|user|>hi<|end|><|assistant|>Hello!<|end|><|user|>What is 3 + 4?<|end|>"
    assert TOKENIZER.chat_text(CHAT) == f"{text}<|assistant|>"
    assert TOKENIZER.chat_text(CHAT, add_generation_prompt=False) == text
    [end] = TOKENIZER.eos_token_ids
    assert TOKENIZER.token_text(end) == "<|end|>" and chat_ids(TOKENIZER, CHAT).count(end) == 4
    developer = [{"role": "developer", "content": "Be kind."}, *CHAT[1:]]
    assert TOKENIZER.chat_text(developer) == TOKENIZER.chat_text(CHAT)


def test_an_answer_can_be_begun_for_the_model() -> None:
    begun = [*CHAT, {"role": "assistant", "content": '{"name":'}]
    text = TOKENIZER.chat_text(begun, continue_final_message=True, add_generation_prompt=False)
    assert text.endswith('<|assistant|>{"name":')


def test_a_role_that_it_does_not_know_is_refused() -> None:
    with pytest.raises(RequestError, match="system, user and assistant"):
        TOKENIZER.chat_text([*CHAT, {"role": "critic", "content": "no"}])


def test_training_and_serving_make_the_same_ids_of_a_conversation() -> None:
    backend = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
    [(ids, learned)] = packing.encoded(backend, [[*CHAT, {"role": "assistant", "content": "3 + 4 = 7."}]])
    prompt = chat_ids(TOKENIZER, CHAT)
    assert ids[: len(prompt)] == prompt
    # Answers are learned, with their end; what comes before each of them is not.
    said = [
        TOKENIZER.decode([token], skip_special_tokens=False) for token, use in zip(ids, learned, strict=True) if use
    ]
    assert "".join(said) == "Hello!<|end|>3 + 4 = 7.<|end|>"


def test_digits_are_tokens_of_their_own() -> None:
    assert len(TOKENIZER.encode("12345", add_special_tokens=False)) == 5


def test_both_models_have_one_tokenizer() -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (FOLDER / name).read_bytes() == (DRAFT_FOLDER / name).read_bytes()
    assert json.loads((FOLDER / "tokenizer_config.json").read_text())["chat_template"] == vocabulary.TEMPLATE


def test_training_a_tokenizer_gives_the_same_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocabulary, "DOCUMENTS", 1000)
    made = vocabulary.train()
    assert made.to_str() == vocabulary.train().to_str()
    assert made.get_vocab_size() == vocabulary.SIZE == TOKENIZER.vocab_size
    for text in (*vocabulary.SPECIAL, "a"):
        assert made.token_to_id(text) == Tokenizer.from_file(str(FOLDER / "tokenizer.json")).token_to_id(text)
