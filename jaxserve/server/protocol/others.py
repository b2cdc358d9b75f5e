# SPDX-License-Identifier: Apache-2.0
"""The bodies of /v1/embeddings, /tokenize and /detokenize."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from jaxserve.server.protocol.base import Body, Expected
from jaxserve.server.protocol.bounds import MAX_VALUES
from jaxserve.server.protocol.chat import MAX_MESSAGES, ChatMessage, Conversation
from jaxserve.server.protocol.completion import Ids, one_or_many
from jaxserve.server.protocol.generated import with_unsupported
from jaxserve.server.protocol.sampling import Ordered
from jaxserve.unsupported import EMBEDDING_FIELDS

MAX_INPUTS = 2048  # OpenAI's limit

Inputs = (
    str
    | Annotated[list[str], Field(fail_fast=True, max_length=MAX_INPUTS)]
    | Ids
    | Annotated[list[Ids], Field(fail_fast=True, max_length=MAX_INPUTS)]
)


class EmbeddingRequest(with_unsupported(Ordered, EMBEDDING_FIELDS)):
    input: Annotated[Inputs, one_or_many(MAX_INPUTS, "inputs")]
    encoding_format: Annotated[Literal["float", "base64"] | None, Expected('"float" or "base64"')] = None
    dimensions: Annotated[
        int | None, Field(ge=1, le=2**31 - 1, description="Must be the model's own number of dimensions.")
    ] = None


class TokenizeRequest(Conversation):
    """Has either a prompt or messages."""

    prompt: str | None = None
    messages: Annotated[list[ChatMessage] | None, Field(fail_fast=True, min_length=1, max_length=MAX_MESSAGES)] = None  # pyright: ignore[reportIncompatibleVariableOverride, reportGeneralTypeIssues]
    add_special_tokens: Annotated[
        bool | None, Field(description="Defaults to true for a prompt and false for messages.")
    ] = None
    return_token_strs: bool | None = None

    @model_validator(mode="after")
    def _check_one(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("one of prompt and messages is required; send exactly one")
        return self


class DetokenizeRequest(Body):
    tokens: Annotated[list[int], Field(fail_fast=True, max_length=MAX_VALUES)]
