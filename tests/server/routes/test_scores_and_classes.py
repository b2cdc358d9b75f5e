# SPDX-License-Identifier: Apache-2.0
"""/pooling, /classify, /score and /rerank: a head on hidden states of the dense model."""

import base64
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from jaxserve.frontend.pooling import Classifier, DenseLayer, Pooling
from jaxserve.types.request import Pool
from tests.server.routes.served import Served
from tests.tiny_llm import SPEC, Reference

HEAD = np.random.default_rng(5).normal(size=(3, SPEC.hidden)).astype(np.float32)
CLASSES = Pooling(classifier=Classifier(DenseLayer(HEAD, None, "softmax"), ("bad", "so-so", "good")))
SCORER = Pooling(classifier=Classifier(DenseLayer(HEAD[:1], None, "sigmoid"), ("LABEL_0",)))
LONG = "x y " * 5000
TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}{# 'query' 'document' #}"


@pytest.fixture
def pooled(served: Served) -> Iterator[Served]:
    """Whatever a test sets is undone."""
    yield served
    served.serving.pooling, served.serving.chat_template = Pooling(), None


def hidden(served: Served, reference: Reference, text: str, second: str | None = None) -> np.ndarray:
    tokenizer = served.serving.tokenizer
    assert tokenizer is not None
    ids = tokenizer.encode(text) if second is None else tokenizer.encode_pair(text, second)
    return reference.embedding(ids).astype(np.float64)


def unit(vector: np.ndarray) -> np.ndarray:
    return vector / np.linalg.norm(vector)


def softmax(values: np.ndarray) -> np.ndarray:
    powers = np.exp(values - values.max())
    return powers / powers.sum()


def sigmoid(value: float) -> float:
    return 1 / (1 + np.exp(-value))


def test_classes(pooled: Served, reference: Reference) -> None:
    pooled.serving.pooling = CLASSES
    texts = ["hello", "The sum of two and three"]
    reply = pooled.post("/classify", {"input": texts}).json
    assert reply["object"] == "list" and reply["id"].startswith("classify-") and reply["model"] == "tiny"
    for index, (text, item) in enumerate(zip(texts, reply["data"], strict=True)):
        wanted = softmax(HEAD @ hidden(pooled, reference, text))
        np.testing.assert_allclose(item["probs"], wanted, atol=1e-4)
        assert item["label"] == ("bad", "so-so", "good")[int(wanted.argmax())]
        assert (item["index"], item["num_classes"]) == (index, 3)
    one = pooled.post("/pooling", {"input": "hello", "encoding_format": "base64"}).json["data"]
    values = np.frombuffer(base64.b64decode(one[0]["data"]), "<f4")
    np.testing.assert_allclose(values, reply["data"][0]["probs"], atol=1e-6)
    refused = pooled.post("/score", {"text_1": "a", "text_2": "b"})
    assert refused.status == 400 and refused.json["error"]["message"] == (
        "This model assigns 3 labels, and no score. Use /classify."
    )


def test_pooling_gives_embeddings(pooled: Served) -> None:
    embedded = pooled.post("/v1/embeddings", {"input": ["a", "b"]}).json["data"]
    reply = pooled.post("/pooling", {"input": ["a", "b"]}).json
    assert [item["data"] for item in reply["data"]] == [item["embedding"] for item in embedded]
    assert {item["object"] for item in reply["data"]} == {"pooling"}
    refused = pooled.post("/classify", {"input": "a"})
    assert refused.status == 400 and "has no classification head" in refused.json["error"]["message"]


@pytest.mark.parametrize("pool", ["mean", "weighted_mean", "first"])
def test_other_pools(pooled: Served, reference: Reference, pool: Pool) -> None:
    tokenizer = pooled.serving.tokenizer
    assert tokenizer is not None
    texts = ["The sum of two and three", "hello"]
    wanted: list[np.ndarray] = []
    for text in texts:
        ids = tokenizer.encode(text)
        states = [reference.embedding(ids[: end + 1]).astype(np.float64) for end in range(len(ids))]
        weights = {"mean": [1.0] * len(ids), "weighted_mean": range(1, len(ids) + 1), "first": [1.0, *[0.0] * 99]}
        wanted.append(unit(np.average(states, axis=0, weights=list(weights[pool])[: len(ids)])))
    pooled.serving.pooling = Pooling(pool)
    for path, content in (("/v1/embeddings", "embedding"), ("/pooling", "data")):
        data = pooled.post(path, {"input": texts}).json["data"]
        np.testing.assert_allclose([item[content] for item in data], wanted, atol=1e-4)
    reply = pooled.post("/v1/score", {"text_1": texts[0], "text_2": texts}).json
    cosine = float(wanted[0] @ wanted[1])
    np.testing.assert_allclose([item["score"] for item in reply["data"]], [1, cosine], atol=1e-4)
    again = pooled.post("/v1/embeddings", {"input": texts}).json
    assert again["usage"]["prompt_tokens"] == sum(len(tokenizer.encode(text)) for text in texts)
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    pooled.serving.pooling = replace(CLASSES, pool=pool)  # the head reads the last token all the same
    one = pooled.post("/pooling", {"input": texts[:1]}).json["data"][0]["data"]
    np.testing.assert_allclose(one, softmax(HEAD @ hidden(pooled, reference, texts[0])), atol=1e-4)


@pytest.mark.parametrize("path", ["/score", "/v1/score"])
def test_scores_of_embeddings(pooled: Served, reference: Reference, path: str) -> None:
    """The cosine."""
    first, second = "hello", ["hello", "The sum", "x"]
    reply = pooled.post(path, {"text_1": first, "text_2": second}).json
    wanted = [unit(hidden(pooled, reference, first)) @ unit(hidden(pooled, reference, text)) for text in second]
    np.testing.assert_allclose([item["score"] for item in reply["data"]], wanted, atol=1e-5)
    assert [item["object"] for item in reply["data"]] == ["score"] * 3
    tokens = len(pooled.serving.tokenizer.encode("hello"))  # pyright: ignore[reportOptionalMemberAccess]
    assert reply["usage"]["prompt_tokens"] < 4 * tokens + 12, "equal texts are computed once"
    newer = pooled.post(path, {"queries": [first], "documents": second}).json
    assert [item["score"] for item in newer["data"]] == [item["score"] for item in reply["data"]]


def test_scores_of_pairs(pooled: Served, reference: Reference) -> None:
    pooled.serving.pooling = SCORER
    pairs = [("a", "b"), ("query", "a document")]
    body = {"text_1": [first for first, _ in pairs], "text_2": [second for _, second in pairs]}
    wanted = [sigmoid(float(HEAD[0] @ hidden(pooled, reference, *pair))) for pair in pairs]
    reply = pooled.post("/score", body).json
    np.testing.assert_allclose([item["score"] for item in reply["data"]], wanted, atol=1e-5)
    pooled.serving.chat_template = TEMPLATE
    tokenizer = pooled.serving.tokenizer
    assert tokenizer is not None
    ids = tokenizer.encode("<query>query<document>a document", add_special_tokens=False)
    templated = pooled.post("/score", {"text_1": "query", "text_2": "a document"}).json["data"][0]["score"]
    assert templated == pytest.approx(sigmoid(float(HEAD[0] @ reference.embedding(ids))), abs=1e-5)


@pytest.mark.parametrize("path", ["/rerank", "/v1/rerank", "/v2/rerank"])
def test_reranking(pooled: Served, path: str) -> None:
    documents: list[Any] = ["hello", {"text": "The sum of two"}, "x y z"]
    texts = ["hello", "The sum of two", "x y z"]
    reply = pooled.post(path, {"query": "hello", "documents": documents}).json
    scores = [item["score"] for item in pooled.post("/score", {"text_1": "hello", "text_2": texts}).json["data"]]
    assert [item["index"] for item in reply["results"]] == sorted(range(3), key=lambda i: -scores[i])
    for item in reply["results"]:
        assert item["relevance_score"] == pytest.approx(scores[item["index"]], abs=1e-6)
        assert item["document"] == {"text": texts[item["index"]]}
    best = pooled.post(path, {"query": "hello", "documents": texts, "top_n": 1, "return_documents": False}).json
    assert best["results"] == [{"index": 0, "relevance_score": pytest.approx(1, abs=1e-5)}]
    assert best["usage"]["total_tokens"] == reply["usage"]["total_tokens"]


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("/score", {"text_1": "a"}, "text_2 is missing"),
        ("/score", {"text_1": "a", "queries": "b", "text_2": "c"}, "queries and text_1 are both set"),
        ("/score", {"text_1": ["a", "b"], "text_2": ["c", "d", "e"]}, "text_1 has 2 texts and text_2 has 3"),
        ("/score", {"text_1": "", "text_2": "b"}, "text_1 has an empty text"),
        ("/score", {"text_1": "a", "text_2": 5}, "text_2 must be a string or a list"),
        ("/rerank", {"query": "a", "documents": []}, "documents must"),
        ("/rerank", {"query": "", "documents": ["a"]}, "query must not be empty"),
        (
            "/rerank",
            {"query": "a", "documents": ["b", {"title": "c"}]},
            "documents[1] must be a string or an object with",
        ),
        ("/rerank", {"query": "a", "documents": ["b", 5]}, "documents[1] must be a string or an object with a text"),
        ("/score", {"text_1": "a", "text_2": "b", "use_activation": False}, "use_activation is not supported yet"),
        ("/pooling", {"input": "a", "use_activation": False}, "use_activation is not supported yet"),
        ("/pooling", {"input": "a", "task": "token_embed"}, "Remove it, and use /v1/embeddings"),
        ("/v1/embeddings", {"input": "a", "normalize": False}, "normalize is not supported yet"),
        ("/rerank", {"query": "a", "documents": ["b"], "top_n": -1}, "top_n must be at least 0"),
        ("/classify", {}, "input is missing"),
    ],
)
def test_bad_bodies(pooled: Served, path: str, body: dict[str, Any], message: str) -> None:
    refused = pooled.post(path, body)
    assert refused.status == 400 and message in refused.json["error"]["message"], refused.json


@pytest.mark.parametrize(
    ("path", "body", "param", "message"),
    [
        ("/score", {"text_1": LONG, "text_2": ["b", "c"]}, "text_1", "this model's maximum"),
        ("/score", {"text_1": "a", "text_2": ["b", LONG]}, "text_2", "text_2 1: this model's maximum"),
        ("/score", {"text_1": ["a", LONG], "text_2": ["b", "c"]}, "text_1", "text_1 1: this model's maximum"),
        ("/score", {"text_1": "a", "text_2": LONG}, "text_2", "this model's maximum"),
        ("/rerank", {"query": "a", "documents": ["b", "a", LONG]}, "documents", "documents 2: this model's maximum"),
        ("/rerank", {"query": LONG, "documents": ["b"]}, "query", "this model's maximum"),
    ],
)
def test_a_text_that_is_too_long_is_named(
    pooled: Served, path: str, body: dict[str, Any], param: str, message: str
) -> None:
    error = pooled.post(path, body).error
    assert error["param"] == param and error["message"].lower().startswith(message)
    assert f"the {param} has" in error["message"]


def test_documents_of_both_kinds_with_unknown_fields(pooled: Served) -> None:
    for documents in (["hello", {"text": "x", "title": "y"}], [{"text": "x", "title": "y"}, "hello"]):
        reply = pooled.post("/rerank", {"query": "hello", "documents": documents})
        assert reply.status == 200 and reply.headers["x-jaxserve-ignored"] == "documents.title"
        assert reply.json["results"][0]["document"] == {"text": "hello"}


@pytest.mark.parametrize("name", ["use_activation", "normalize", "softmax", "activation"])
def test_what_vectors_are_anyway_may_be_asked_for(pooled: Served, name: str) -> None:
    assert pooled.post("/pooling", {"input": "a", name: True}).status == 200


def test_dimensions(pooled: Served) -> None:
    refused = pooled.post("/v1/embeddings", {"input": "a", "dimensions": 4})
    assert refused.status == 400 and "because embeddings cannot be shortened" in refused.json["error"]["message"]
    pooled.serving.pooling = Pooling(dimensions=(4, 8))
    whole = np.asarray(pooled.post("/v1/embeddings", {"input": "a"}).json["data"][0]["embedding"])
    short = np.asarray(pooled.post("/v1/embeddings", {"input": "a", "dimensions": 4}).json["data"][0]["embedding"])
    np.testing.assert_allclose(short, unit(whole[:4]), atol=1e-6)
    refused = pooled.post("/v1/embeddings", {"input": "a", "dimensions": 5})
    assert refused.status == 400 and "Use one of 4, 8" in refused.json["error"]["message"]
    pooled.serving.pooling = Pooling(unsupported="its pooling mode is max")
    refused = pooled.post("/v1/embeddings", {"input": "a"})
    assert refused.status == 400 and "cannot be computed: its pooling mode is max" in refused.json["error"]["message"]
