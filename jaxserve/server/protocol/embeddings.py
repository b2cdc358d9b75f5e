# SPDX-License-Identifier: Apache-2.0
"""The bodies of /v1/embeddings, /pooling and /classify: texts or token ids, and the form of the vectors; and those of
/score and /rerank: pairs of texts."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from jaxserve.server.protocol.base import AS_WHOLE, Expected, Strict
from jaxserve.server.protocol.completion import Ids, one_or_many
from jaxserve.server.protocol.generated import with_unsupported
from jaxserve.server.protocol.long_values import LONG
from jaxserve.server.protocol.sampling import Ordered
from jaxserve.unsupported import EMBEDDING_FIELDS, SCORE_FIELDS

MAX_INPUTS = 2048  # OpenAI's limit

Inputs = (
    str
    | Annotated[list[str], Field(fail_fast=True, max_length=MAX_INPUTS)]
    | Ids
    | Annotated[list[Ids], Field(fail_fast=True, max_length=MAX_INPUTS)]
)


class VectorRequest(Ordered):
    input: Annotated[Inputs, one_or_many(MAX_INPUTS, "inputs"), LONG]
    encoding_format: Annotated[Literal["float", "base64"] | None, Expected('"float" or "base64"')] = None
    dimensions: Annotated[
        int | None,
        Field(ge=1, le=2**31 - 1, description="Shorten embeddings to this many dimensions, if the model allows it."),
        AS_WHOLE,
    ] = None


class EmbeddingRequest(with_unsupported(VectorRequest, EMBEDDING_FIELDS)):
    pass


class PoolingRequest(with_unsupported(VectorRequest, EMBEDDING_FIELDS)):
    pass


class ClassifyRequest(with_unsupported(Ordered, EMBEDDING_FIELDS)):
    input: Annotated[Inputs, one_or_many(MAX_INPUTS, "inputs"), LONG]


Texts = str | Annotated[list[str], Field(fail_fast=True, min_length=1, max_length=MAX_INPUTS)]
_TEXTS = Expected(f"a string or a list of 1 to {MAX_INPUTS} strings")


class ScoreRequest(with_unsupported(Ordered, SCORE_FIELDS)):
    text_1: Annotated[Texts | None, _TEXTS] = None
    text_2: Annotated[Texts | None, _TEXTS] = None
    queries: Annotated[Texts | None, Field(description="Same as text_1."), _TEXTS] = None
    documents: Annotated[Texts | None, Field(description="Same as text_2."), _TEXTS] = None

    @model_validator(mode="after")
    def _check_names(self) -> Self:
        for name, other in (("text_1", "queries"), ("text_2", "documents")):
            given = [getattr(self, each) is not None for each in (name, other)]
            if all(given):
                raise ValueError(f"{other} and {name} are both set; send one of them")
            if not any(given):
                raise ValueError(f"{name} is missing; add it")
        return self


class Document(Strict):
    text: str


Documents = Annotated[list[str | Document], Field(fail_fast=True, min_length=1, max_length=MAX_INPUTS)]


class RerankRequest(with_unsupported(Ordered, SCORE_FIELDS)):
    query: Annotated[str, Field(min_length=1)]
    documents: Annotated[
        Documents,
        Expected(
            f"a list of 1 to {MAX_INPUTS} documents, each a string or an object with a text",
            each="a string or an object with a text",
        ),
    ]
    top_n: Annotated[
        int | None,
        Field(ge=0, le=2**31 - 1, description="Return this many results; all by default or with 0."),
        AS_WHOLE,
    ] = None
    return_documents: Annotated[bool | None, Field(description="Return each result's document; true by default.")] = (
        None
    )
