# SPDX-License-Identifier: Apache-2.0
"""What LLM and AsyncLLM compute from hidden states: which prompts to run, and what to make of their hidden states."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from jaxserve.errors import RequestError
from jaxserve.frontend.pooling import Pairs, Pooling, Vector, cosines, pair_prompt, texts_of
from jaxserve.frontend.prepare import Prompt
from jaxserve.text.tokenizer import Tokenizer
from jaxserve.types.outputs import ClassificationOutput
from jaxserve.types.request import Pool


@dataclass(frozen=True)
class PooledCall[Result]:
    prompts: Sequence[Prompt]
    pool: Pool
    results: Callable[[Sequence[Vector]], list[Result]]  # of the prompts' hidden states


def embedding(pooling: Pooling, prompts: Sequence[Prompt], dimensions: int | None, hidden: int) -> PooledCall[Vector]:
    """`hidden`: the length of hidden states."""
    pooling.check_embeds()
    kept = pooling.dimensions_of(dimensions, hidden)

    def results(states: Sequence[Vector]) -> list[Vector]:
        return [pooling.embedding(state, dimensions=kept) for state in states]

    return PooledCall(prompts, pooling.pool, results)


def classification(pooling: Pooling, prompts: Sequence[Prompt]) -> PooledCall[ClassificationOutput]:
    classifier = pooling.classifier
    if classifier is None:
        problem = "this model has no classification head"
        raise RequestError("model", problem, "use a sequence-classification model, or embed the texts")

    def results(states: Sequence[Vector]) -> list[ClassificationOutput]:
        return [ClassificationOutput(classifier.label(found), found) for found in map(pooling.probabilities, states)]

    return PooledCall(prompts, "last", results)


def score(
    pooling: Pooling, pairs: Pairs, tokenizer: Tokenizer, *, chat_template: str | None = None
) -> PooledCall[float]:
    """By a model with one score, else the cosine of both embeddings."""
    if pooling.classifier is None:
        pooling.check_embeds()
        texts = texts_of(pairs)
        return PooledCall(texts, pooling.pool, lambda states: _cosines(pooling, pairs, texts, states))
    if not pooling.classifier.scores:
        problem = f"this model assigns {len(pooling.classifier.labels)} labels, and no score"
        raise RequestError("model", problem, "classify the texts instead")
    prompts = [pair_prompt(tokenizer, query, document, chat_template=chat_template) for query, document in pairs]
    return PooledCall(prompts, "last", lambda states: [float(pooling.probabilities(state)[0]) for state in states])


def _cosines(pooling: Pooling, pairs: Pairs, texts: Sequence[str], states: Sequence[Vector]) -> list[float]:
    return cosines(pairs, dict(zip(texts, map(pooling.embedding, states), strict=True)))
