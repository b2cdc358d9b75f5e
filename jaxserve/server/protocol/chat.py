# SPDX-License-Identifier: Apache-2.0
"""The body of /v1/chat/completions."""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from jaxserve.server.protocol.base import AS_WHOLE, Expected, Name, NeverTrue, RequestBody, Strict
from jaxserve.server.protocol.generated import with_unsupported
from jaxserve.server.protocol.long_values import LONG_MESSAGES
from jaxserve.server.protocol.sampling import Sampling
from jaxserve.unsupported import CHAT_FIELDS, CONVERSATION_FIELDS, MESSAGE_FIELDS

MAX_MESSAGES = 4096
MAX_PARTS = 1024
MAX_TEMPLATE_VALUES = 64


class ContentPart(BaseModel):
    """A part of a message. The tokenizer rejects all types except text, by name."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)

    type: Name
    text: str | None = None


class ChatMessage(with_unsupported(Strict, MESSAGE_FIELDS)):
    """A message. Clients that send a response back include fields that it had, whether they have a value or not.

    Templates of reasoning models read what the model thought before as reasoning_content."""

    role: Annotated[str, Field(min_length=1, max_length=64)]
    content: Annotated[
        str | Annotated[list[ContentPart], Field(fail_fast=True, max_length=MAX_PARTS)] | None,
        Expected("a string, or a list of parts of type text"),
    ] = None
    name: Name | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None  # the older name
    type: Annotated[Literal["text", "message"] | None, Field(description="No effect.")] = None
    annotations: Annotated[list[Any] | None, Field(description="No effect.")] = None
    provider_specific_fields: Annotated[Any, Field(description="No effect.")] = None

    @model_validator(mode="after")
    def _check_content(self) -> Self:
        if self.content is None and self.role != "assistant":
            raise ValueError(f"content is missing, which a message of role {self.role!r} requires; add it, as a string")
        return self

    def plain(self) -> dict[str, Any]:
        """The form that chat templates take."""
        content = self.content
        if content is not None and not isinstance(content, str):
            content = [{"type": part.type, "text": part.text} for part in content]
        plain: dict[str, Any] = {"role": self.role, "content": content}
        if self.name is not None:
            plain["name"] = self.name
        if reasoning := self.reasoning or self.reasoning_content:
            plain |= {"reasoning": reasoning, "reasoning_content": reasoning}
        return plain


class Conversation(with_unsupported(RequestBody, CONVERSATION_FIELDS)):
    """Messages, and the options of the chat template."""

    messages: Annotated[list[ChatMessage], Field(fail_fast=True, min_length=1, max_length=MAX_MESSAGES), LONG_MESSAGES]
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template: Annotated[str | None, Field(description="Requires --trust-request-chat-template.")] = None
    chat_template_kwargs: Annotated[dict[str, Any] | None, Field(max_length=MAX_TEMPLATE_VALUES)] = None

    @model_validator(mode="after")
    def _check_end(self) -> Self:
        if self.continue_final_message and self.add_generation_prompt:
            problem = "continue_final_message and add_generation_prompt are both true"
            raise ValueError(f"{problem}; set add_generation_prompt to false")
        return self

    @property
    def generation_prompt(self) -> bool:
        """Whether the template adds the start of an assistant message."""
        return not self.continue_final_message and self.add_generation_prompt is not False


class ChatRequest(with_unsupported(Sampling, CHAT_FIELDS), Conversation):
    max_tokens: Annotated[int | None, Field(ge=1, le=2**31 - 1, description="See max_completion_tokens."), AS_WHOLE] = (
        None
    )
    max_completion_tokens: Annotated[
        int | None,
        Field(
            ge=1,
            le=2**31 - 1,
            description="Maximum number of tokens to generate; overrides max_tokens. Default: the rest of the context.",
        ),
        AS_WHOLE,
    ] = None
    logprobs: Annotated[bool | None, Field(description="Return the log probability of each token.")] = None
    top_logprobs: Annotated[
        int | None,
        Field(ge=-1, le=2**31 - 1, description="Number of most likely tokens to include in logprobs; -1 for all."),
        AS_WHOLE,
    ] = None
    return_prompt_text: bool | None = None
    parallel_tool_calls: Annotated[bool | None, Field(description="No effect: tools are not supported yet.")] = None
    tool_choice: Annotated[
        Literal["none", "auto"] | None,
        Field(description="No effect: tools are not supported yet."),
        Expected('"none" or "auto"'),
    ] = None
    modalities: Annotated[
        list[Literal["text"]] | None, Field(max_length=1, description="Text only."), Expected('["text"]')
    ] = None
    include_reasoning: Annotated[
        Literal[True] | None, Field(description="false is not supported yet."), Expected("true")
    ] = None
    return_assistant_tokens_mask: NeverTrue = None

    @model_validator(mode="after")
    def _check_logprobs(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs requires logprobs=true; set logprobs")
        return self
