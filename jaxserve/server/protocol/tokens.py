# SPDX-License-Identifier: Apache-2.0
"""The bodies of /tokenize and /detokenize."""

from typing import Annotated, Self

from pydantic import Field, model_validator

from jaxserve.server.protocol.base import RequestBody
from jaxserve.server.protocol.bounds import MAX_VALUES
from jaxserve.server.protocol.chat import MAX_MESSAGES, ChatMessage, Conversation
from jaxserve.server.protocol.long_values import LONG, LONG_MESSAGES


class TokenizeRequest(Conversation):
    """Has either a prompt or messages."""

    prompt: Annotated[str | None, LONG] = None
    messages: Annotated[  # pyright: ignore[reportIncompatibleVariableOverride, reportGeneralTypeIssues]
        list[ChatMessage] | None, Field(fail_fast=True, min_length=1, max_length=MAX_MESSAGES), LONG_MESSAGES
    ] = None
    add_special_tokens: Annotated[
        bool | None, Field(description="Defaults to true for a prompt and false for messages.")
    ] = None
    return_token_strs: bool | None = None

    @model_validator(mode="after")
    def _check_one(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("one of prompt and messages is required; send exactly one")
        return self


class DetokenizeRequest(RequestBody):
    tokens: Annotated[list[int], Field(fail_fast=True, max_length=MAX_VALUES), LONG]
