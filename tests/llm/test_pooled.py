# SPDX-License-Identifier: Apache-2.0
"""LLM and AsyncLLM: hidden states, embeddings, classes and scores, against the dense model."""

import asyncio
from collections.abc import Iterator

import numpy as np
import pytest

from jaxserve.async_llm import AsyncLLM
from jaxserve.config import ConfigError
from jaxserve.errors import JaxserveError, RequestError
from jaxserve.frontend.pooling import Classifier, DenseLayer, Pooling
from jaxserve.llm import LLM
from jaxserve.types.request import Pool
from tests import tiny_llm
from tests.llm.checks import LONG, TOKENIZER, run
from tests.tiny_llm import SPEC, Reference

HEAD = np.random.default_rng(5).normal(size=(3, SPEC.hidden)).astype(np.float32)
CLASSES = Pooling(pool="mean", classifier=Classifier(DenseLayer(HEAD, None, "softmax"), ("bad", "so-so", "good")))
SCORER = Pooling(classifier=Classifier(DenseLayer(HEAD[:1], None, "sigmoid"), ("LABEL_0",)))
MEAN = Pooling(pool="mean", dimensions=(8,))
TEXTS = ["The server", "a", "a sum of two"]


@pytest.fixture
def pooled(llm: LLM, engine: AsyncLLM) -> Iterator[LLM]:
    """Whatever a test sets as `_pooling` is undone."""
    yield llm
    llm._pooling = engine._pooling = Pooling()


def states(reference: Reference, tokens: list[int]) -> np.ndarray:
    """No token attends to later ones, so each one's state is the last of a shorter prompt."""
    return np.stack([reference.embedding(tokens[: end + 1]) for end in range(len(tokens))]).astype(np.float64)


def unit(vector: np.ndarray) -> np.ndarray:
    return vector / np.linalg.norm(vector)


def test_hidden_states_of_every_pool(pooled: LLM, reference: Reference) -> None:
    prompts = [LONG, LONG[:5], [7]]
    for _ in range(2):  # the second time prompts are cached
        for found, prompt in zip(pooled.encode(prompts, pool="mean"), prompts, strict=True):
            np.testing.assert_allclose(found, states(reference, prompt).mean(axis=0), rtol=1e-4, atol=1e-4)
        for found, prompt in zip(pooled.encode(prompts, pool="weighted_mean"), prompts, strict=True):
            wanted = np.average(states(reference, prompt), axis=0, weights=np.arange(len(prompt)) + 1)
            np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)
        for found, prompt in zip(pooled.encode(prompts, pool="first"), prompts, strict=True):
            np.testing.assert_allclose(found, reference.embedding(prompt[:1]), rtol=1e-4, atol=1e-4)
        for found, prompt in zip(pooled.encode(prompts), prompts, strict=True):
            np.testing.assert_allclose(found, reference.embedding(prompt), rtol=1e-4, atol=1e-4)
    with pytest.raises(RequestError, match="pool is 'max', expected one of last, first, mean, weighted_mean"):
        pooled.encode(prompts, pool="max")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("pool", ["last", "mean"])
def test_embeddings_and_their_cosines(pooled: LLM, engine: AsyncLLM, reference: Reference, pool: Pool) -> None:
    pooled._pooling = engine._pooling = Pooling(pool=pool, dimensions=(8,))
    each = [states(reference, TOKENIZER.encode(text)) for text in TEXTS]
    wanted = [state[-1] if pool == "last" else state.mean(axis=0) for state in each]
    found = pooled.embed(TEXTS)
    np.testing.assert_allclose(found, list(map(unit, wanted)), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(pooled.embed(TEXTS[0], dimensions=8)[0], unit(wanted[0][:8]), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(pooled.encode(TEXTS), wanted, rtol=1e-4, atol=1e-4)
    cosines = [unit(wanted[0]) @ unit(other) for other in wanted]
    np.testing.assert_allclose(pooled.score(TEXTS[0], TEXTS), cosines, atol=1e-5)
    np.testing.assert_allclose(pooled.score(TEXTS[:1], TEXTS[1]), cosines[1:2], atol=1e-5)

    async def work() -> None:
        made = await asyncio.gather(*map(engine.embed, TEXTS))
        np.testing.assert_allclose(made, found, atol=1e-5)
        assert len(await engine.embed(TEXTS[0], dimensions=8)) == 8
        assert await engine.score(TEXTS[0], TEXTS[1]) == pytest.approx(cosines[1], abs=1e-5)
        np.testing.assert_allclose(await engine.encode(LONG, pool="last"), reference.embedding(LONG), atol=1e-4)

    run(work())


def test_classes_are_made_of_the_last_token(pooled: LLM, engine: AsyncLLM, reference: Reference) -> None:
    pooled._pooling = engine._pooling = CLASSES
    found = pooled.classify(TEXTS)
    for text, output in zip(TEXTS, found, strict=True):
        powers = np.exp(HEAD @ reference.embedding(TOKENIZER.encode(text)).astype(np.float64))
        np.testing.assert_allclose(output.probs, powers / powers.sum(), atol=1e-4)
        assert output.label == ("bad", "so-so", "good")[int(powers.argmax())]
    [first, *_] = found

    async def work() -> None:
        output = await engine.classify(TEXTS[0])
        assert output.label == first.label
        np.testing.assert_allclose(output.probs, first.probs, atol=1e-5)

    run(work())
    with pytest.raises(RequestError, match="assigns 3 labels, and no score; classify the texts instead"):
        pooled.score("a", "b")


@pytest.mark.parametrize(("first", "second", "name"), [("", "a", "text_1"), ("a", ["b", ""], "text_2")])
def test_empty_texts_have_no_score(pooled: LLM, first: str, second: str | list[str], name: str) -> None:
    pooled._pooling = SCORER
    with pytest.raises(RequestError, match=f"{name} has an empty text"):
        pooled.score(first, second)


def test_scores_of_pairs(pooled: LLM, engine: AsyncLLM, reference: Reference) -> None:
    pooled._pooling = engine._pooling = SCORER
    pairs = [("a", "b"), ("query", "a document")]

    def right(ids: list[int]) -> float:
        return 1 / (1 + np.exp(-float(HEAD[0] @ reference.embedding(ids))))

    wanted = [right(TOKENIZER.encode_pair(*pair)) for pair in pairs]
    np.testing.assert_allclose(pooled.score(*zip(*pairs, strict=True)), wanted, atol=1e-5)
    template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}{# 'query' 'document' #}"
    ids = TOKENIZER.encode("<query>a<document>b", add_special_tokens=False)
    assert pooled.score("a", "b", chat_template=template) == [pytest.approx(right(ids), abs=1e-5)]
    assert run(engine.score("a", "b")) == pytest.approx(wanted[0], abs=1e-5)


def test_errors_come_before_any_work(pooled: LLM, engine: AsyncLLM) -> None:
    before = pooled.metrics().requests
    with pytest.raises(RequestError, match="text_1 has 2 texts and text_2 has 3"):
        pooled.score(["a", "b"], ["c", "d", "e"])
    with pytest.raises(RequestError, match="this model has no classification head; use a sequence-classification"):
        pooled.classify("a")
    with pytest.raises(RequestError, match="because embeddings cannot be shortened"):
        pooled.embed("a", dimensions=8)
    with pytest.raises(RequestError, match="no classification head"):
        run(engine.classify("a"))
    pooled._pooling = MEAN
    for dimensions, words in ((9, "use one of 8"), (1000, f"embeddings have {SPEC.hidden}"), (0, "use at least 1")):
        with pytest.raises(RequestError, match=words):
            pooled.embed("a", dimensions=dimensions)
    pooled._pooling = Pooling(unsupported="its pooling mode is max")
    with pytest.raises(RequestError, match="embeddings cannot be computed: its pooling mode is max; use another"):
        pooled.score("a", "b")
    assert pooled.metrics().requests == before


def test_an_aborted_request_raises(engine: AsyncLLM) -> None:
    async def work() -> None:
        task = asyncio.create_task(engine.encode(LONG, "mine", pool="mean"))
        await asyncio.sleep(0)
        await engine.abort("mine")
        with pytest.raises(JaxserveError, match="the request was aborted; send it again"):
            await task

    run(work())


def test_a_score_from_two_tokens_needs_a_folder() -> None:
    with pytest.raises(ConfigError, match="classifier_from_token is set, and the model has no folder to read its head"):
        tiny_llm.make(classifier_from_token=("a", "b"))
