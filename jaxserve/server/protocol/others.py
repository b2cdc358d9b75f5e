# SPDX-License-Identifier: Apache-2.0
"""The bodies of /v1/embeddings, /tokenize and /detokenize."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from jaxserve.server.protocol.base import Body, NotYet
from jaxserve.server.protocol.bounds import MAX_VALUES
from jaxserve.server.protocol.chat import MAX_MESSAGES, Conversation, Message
from jaxserve.server.protocol.completion import FORMS, Ids
from jaxserve.server.protocol.sampling import Ordered

MAX_INPUTS = 2048  # as many as OpenAI takes

Inputs = (
    str
    | Annotated[list[str], Field(fail_fast=True, max_length=MAX_INPUTS)]
    | Ids
    | Annotated[list[Ids], Field(fail_fast=True, max_length=MAX_INPUTS)]
)


class EmbeddingRequest(Ordered):
    input: Annotated[Inputs, Field(description=f"{FORMS} {MAX_INPUTS} inputs")]
    encoding_format: Annotated[Literal["float", "base64"] | None, Field(description='"float" or "base64"')] = None
    dimensions: Annotated[int | None, Field(ge=1, le=2**31 - 1, description="The model's own number alone.")] = None
    messages: NotYet = None
    embed_dtype: NotYet = None
    endianness: NotYet = None
    use_activation: NotYet = None


class TokenizeRequest(Conversation):
    """Of a prompt, or of messages."""

    prompt: str | None = None
    messages: Annotated[list[Message] | None, Field(fail_fast=True, min_length=1, max_length=MAX_MESSAGES)] = None  # pyright: ignore[reportIncompatibleVariableOverride, reportGeneralTypeIssues]
    add_special_tokens: Annotated[bool | None, Field(description="True for a prompt, false for messages.")] = None
    return_token_strs: bool | None = None

    @model_validator(mode="after")
    def _check_one(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("of prompt and messages one is needed; give one of them")
        return self


class DetokenizeRequest(Body):
    tokens: Annotated[list[int], Field(fail_fast=True, max_length=MAX_VALUES)]
