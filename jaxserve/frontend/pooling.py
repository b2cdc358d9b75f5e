# SPDX-License-Identifier: Apache-2.0
"""What becomes of a prompt's hidden states: an embedding, the probabilities of classes, or a score.

The engine returns one hidden state: of the last token, of the first, or the mean of all. This applies what comes after
it, as sentence-transformers does for `modules.json` (dense layers, normalization) and transformers for a
sequence-classification head. These weights are small: pooling_files.py reads them from the model's folder, and they are
applied here, in float32, so that the engine knows nothing of them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from jaxserve.errors import RequestError
from jaxserve.text.tokenizer import Tokenizer
from jaxserve.types.request import Pool

type Vector = np.ndarray
type Activation = Literal["identity", "sigmoid", "softmax", "tanh", "relu", "silu"]
type Pairs = list[tuple[str, str]]


@dataclass(frozen=True)
class DenseLayer:
    weight: np.ndarray  # [out, in]
    bias: np.ndarray | None
    activation: Activation

    def __call__(self, vector: Vector) -> Vector:
        out = self.weight @ vector
        return activated(out if self.bias is None else out + self.bias, self.activation)


@dataclass(frozen=True)
class Classifier:
    """The last layer of a model that assigns labels, or one score."""

    layer: DenseLayer
    labels: tuple[str, ...]

    @property
    def scores(self) -> bool:
        """Whether it gives one number, as models for reranking do."""
        return len(self.labels) == 1

    def label(self, probabilities: Vector) -> str:
        """The most probable label."""
        return self.labels[int(probabilities.argmax())]


@dataclass(frozen=True)
class Pooling:
    pool: Pool = "last"  # the hidden states that embeddings are made of
    dense: tuple[DenseLayer, ...] = ()
    normalizes: bool = True
    classifier: Classifier | None = None
    dimensions: tuple[int, ...] | None = ()  # shorter embeddings that the model was trained for; None: any
    unsupported: str | None = None  # what the folder asks for and is not supported: there are no embeddings then

    def embedding(self, hidden: Vector, *, dimensions: int | None = None) -> Vector:
        """The embedding in float32. With `dimensions`, only the first ones, scaled to unit length again."""
        vector = hidden.astype(np.float32)
        for layer in self.dense:
            vector = layer(vector)
        vector = vector if dimensions is None else vector[:dimensions]
        return normalized(vector) if self.normalizes else vector

    def size(self, hidden: int) -> int:
        """The length of embeddings of hidden states of this length."""
        return len(self.dense[-1].weight) if self.dense else hidden

    def dimensions_of(self, asked: int | None, hidden: int) -> int | None:
        """How many dimensions to keep of each embedding; None: all. Checked before anything is computed."""
        size = self.size(hidden)
        if asked is None or asked == size:
            return None
        if asked > size:
            problem = f"dimensions is {asked}, but this model's embeddings have {size}"
            raise RequestError("dimensions", problem, "lower it")
        if asked < 1:
            raise RequestError("dimensions", f"dimensions is {asked}", "use at least 1")
        if self.dimensions is not None and asked not in self.dimensions:
            known = ", ".join(map(str, self.dimensions))
            problem = f"dimensions is {asked}, but this model's embeddings have {size}"
            hint = f"use one of {known}" if known else "remove it, because embeddings cannot be shortened"
            raise RequestError("dimensions", problem, hint)
        return asked

    def check_embeds(self) -> None:
        """Raises a RequestError if there are no embeddings."""
        if self.unsupported is not None:
            problem = f"this model's embeddings cannot be computed: {self.unsupported}"
            raise RequestError("model", problem, "use another model")

    def probabilities(self, hidden: Vector) -> Vector:
        """The probabilities of the classes, or the score, from the last token's hidden state."""
        assert self.classifier is not None
        return self.classifier.layer(hidden.astype(np.float32))


def normalized(vector: Vector) -> Vector:
    """The vector scaled to unit length, in float32."""
    length = np.sqrt(np.sum(np.square(vector.astype(np.float64))))
    return (vector / max(float(length), 1e-12)).astype(np.float32)


def activated(values: Vector, activation: Activation) -> Vector:
    match activation:
        case "sigmoid":
            return np.reciprocal(1 + np.exp(-values))
        case "softmax":
            powers = np.exp(values - values.max())
            return powers / powers.sum()
        case "tanh":
            return np.tanh(values)
        case "relu":
            return np.maximum(values, 0)
        case "silu":
            return values / (1 + np.exp(-values))
        case _:
            return values


def pair_prompt(tokenizer: Tokenizer, query: str, document: str, *, chat_template: str | None = None) -> list[int]:
    """Both texts in one prompt: by the chat template if it has the roles for them, else as the tokenizer joins them."""
    if not tokenizer.template_has_role("query", chat_template):
        return tokenizer.encode_pair(query, document)
    messages = [{"role": "query", "content": query}, {"role": "document", "content": document}]
    text = tokenizer.chat_text(messages, chat_template=chat_template, add_generation_prompt=False)
    return tokenizer.encode(text, add_special_tokens=False)


def paired(first: Sequence[str], second: Sequence[str]) -> Pairs:
    """The pairs to score: one text with each of many, or as many with as many."""
    if len(first) not in (1, len(second)):
        problem = f"text_1 has {len(first)} texts and text_2 has {len(second)}"
        raise RequestError("text_1", problem, "send one text_1 for all, or as many as text_2 has")
    for name, texts in (("text_1", first), ("text_2", second)):
        if not all(texts):
            raise RequestError(name, f"{name} has an empty text", "remove it")
    return list(zip(list(first) * len(second) if len(first) == 1 else first, second, strict=True))


def texts_of(pairs: Pairs) -> list[str]:
    """The texts to embed, each once."""
    return list(dict.fromkeys(text for pair in pairs for text in pair))


def cosines(pairs: Pairs, embeddings: Mapping[str, Vector]) -> list[float]:
    """The scores of pairs by the embeddings of their texts."""
    unit = {text: normalized(embedding) for text, embedding in embeddings.items()}
    return [float(np.dot(unit[first], unit[second])) for first, second in pairs]
