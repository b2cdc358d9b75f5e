# SPDX-License-Identifier: Apache-2.0
"""/v1/embeddings against the dense model, /tokenize, /detokenize, /v1/models."""

import base64
from typing import Any

import numpy as np
import pytest

from tests.server.routes.served import Served
from tests.text.chats import chat_ids
from tests.tiny_llm import SPEC, Reference

TEXTS = ["hello", "The sum of two and three", "😀"]


def dense(reference: Reference, ids: list[int]) -> np.ndarray:
    """The hidden state of the last token, normalized to length one."""
    state = reference.embedding(ids).astype(np.float64)
    return state / np.linalg.norm(state)


def test_models(served: Served) -> None:
    models = served.client().models.list()
    assert [model.id for model in models] == ["tiny", "owner/other-name"]
    for name in ("tiny", "owner/other-name"):
        card = served.client().models.retrieve(name)
        assert card.id == name and card.object == "model" and card.owned_by == "jaxserve"
    card = served.send("GET", "/v1/models/owner/other-name").json
    assert card["max_model_len"] == 128 and card["parent"] is None and card["permission"] == []
    reply = served.post("/v1/completions", {"model": "owner/other-name", "prompt": "x", "max_tokens": 1})
    assert reply.json["model"] == "owner/other-name"
    assert served.post("/v1/completions", {"prompt": "x", "max_tokens": 1}).json["model"] == "tiny"


@pytest.mark.parametrize("special", [True, False])
def test_tokens_of_a_text_and_back(served: Served, special: bool) -> None:
    tokenizer = served.serving.tokenizer
    assert tokenizer is not None
    for text in (*TEXTS, "", "a\x00b", "<|eot_id|> x", "é" * 500):
        reply = served.post(
            "/tokenize", {"prompt": text, "add_special_tokens": special, "return_token_strs": True}
        ).json
        ids = tokenizer.encode(text, add_special_tokens=special)
        assert reply["tokens"] == ids and reply["count"] == len(ids) and reply["max_model_len"] == 128
        assert reply["token_strs"] == [tokenizer.token_text(token) for token in ids]
        back = served.post("/detokenize", {"tokens": ids}).json["prompt"]
        assert back == ("<|begin_of_text|>" if special else "") + text
    assert served.post("/tokenize", {"prompt": "x"}).json["token_strs"] is None


def test_tokens_of_a_conversation(served: Served) -> None:
    messages: Any = [{"role": "user", "content": "hi"}]
    tokenizer = served.serving.tokenizer
    assert tokenizer is not None
    assert served.post("/tokenize", {"messages": messages}).json["tokens"] == chat_ids(tokenizer, messages)
    reply = served.post("/tokenize", {"messages": messages, "add_generation_prompt": False}).json
    assert reply["tokens"] == chat_ids(tokenizer, messages, add_generation_prompt=False)


def test_embeddings(served: Served, reference: Reference) -> None:
    tokenizer = served.serving.tokenizer
    assert tokenizer is not None
    client = served.client()
    answer = client.embeddings.create(model="tiny", input=TEXTS)  # asks for base64 by itself
    assert answer.object == "list" and [item.index for item in answer.data] == [0, 1, 2]
    ids = [tokenizer.encode(text) for text in TEXTS]
    for item, tokens in zip(answer.data, ids, strict=True):
        np.testing.assert_allclose(item.embedding, dense(reference, tokens), atol=1e-5)
    assert answer.usage.prompt_tokens == answer.usage.total_tokens == sum(map(len, ids))
    by_ids = client.embeddings.create(model="tiny", input=ids, encoding_format="float", dimensions=SPEC.hidden)
    for one, other in zip(answer.data, by_ids.data, strict=True):
        np.testing.assert_allclose(one.embedding, other.embedding, atol=1e-6)
        assert np.linalg.norm(other.embedding) == pytest.approx(1, abs=1e-5)


def test_embeddings_as_base64(served: Served) -> None:
    [item] = served.post("/v1/embeddings", {"input": "hello", "encoding_format": "base64"}).json["data"]
    floats = served.post("/v1/embeddings", {"input": "hello"}).json["data"][0]["embedding"]
    np.testing.assert_array_equal(np.frombuffer(base64.b64decode(item["embedding"]), "<f4"), np.float32(floats))


def test_an_embedding_may_fill_the_context(served: Served, reference: Reference) -> None:
    ids = [token % 400 for token in range(200)]
    reply = served.post("/v1/embeddings", {"input": ids[:128]})
    assert reply.status == 200 and reply.json["usage"]["prompt_tokens"] == 128
    cut = {"input": ids, "truncate_prompt_tokens": 60, "truncation_side": "right"}
    [item] = served.post("/v1/embeddings", cut).json["data"]
    np.testing.assert_allclose(item["embedding"], dense(reference, ids[:60]), atol=1e-5)
    whole = served.post("/v1/embeddings", {"input": ids, "truncate_prompt_tokens": -1}).json
    assert whole["usage"]["prompt_tokens"] == 128
