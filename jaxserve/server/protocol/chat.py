# SPDX-License-Identifier: Apache-2.0
"""The body of /v1/chat/completions."""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from jaxserve.server.protocol.base import Body, Name, NotYet, Part
from jaxserve.server.protocol.sampling import Sampling

MAX_MESSAGES = 4096
MAX_PARTS = 1024
MAX_TEMPLATE_VALUES = 64


class ContentPart(BaseModel):
    """Text; that all other kinds are refused by name is the tokenizer's doing."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)

    type: Name
    text: str | None = None


class Message(Part):
    """What is null alone comes back from clients that send an answer of ours again."""

    role: Annotated[str, Field(min_length=1, max_length=64)]
    content: Annotated[
        str | Annotated[list[ContentPart], Field(fail_fast=True, max_length=MAX_PARTS)] | None,
        Field(description="a string, or a list of parts of type text"),
    ] = None
    name: Name | None = None
    refusal: NotYet = None
    annotations: NotYet = None
    audio: NotYet = None
    function_call: NotYet = None
    tool_calls: NotYet = None
    tool_call_id: NotYet = None
    reasoning: NotYet = None
    reasoning_content: NotYet = None

    @model_validator(mode="after")
    def _check_content(self) -> Self:
        if self.content is None and self.role != "assistant":
            raise ValueError(f"messages need content, and one of {self.role!r} has none; give a string")
        return self

    def plain(self) -> dict[str, Any]:
        """As chat templates know messages."""
        content = self.content
        if content is not None and not isinstance(content, str):
            content = [{"type": part.type, "text": part.text} for part in content]
        plain: dict[str, Any] = {"role": self.role, "content": content}
        return plain if self.name is None else {**plain, "name": self.name}


class Conversation(Body):
    """What a chat template makes a prompt of."""

    messages: Annotated[list[Message], Field(fail_fast=True, min_length=1, max_length=MAX_MESSAGES)]
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template: Annotated[str | None, Field(description="If the server trusts requests with it.")] = None
    chat_template_kwargs: Annotated[dict[str, Any] | None, Field(max_length=MAX_TEMPLATE_VALUES)] = None
    tools: NotYet = None
    documents: NotYet = None
    media_io_kwargs: NotYet = None
    mm_processor_kwargs: NotYet = None

    @model_validator(mode="after")
    def _check_end(self) -> Self:
        if self.continue_final_message and self.add_generation_prompt:
            problem = "continue_final_message and add_generation_prompt are both true"
            raise ValueError(f"{problem}; set add_generation_prompt to false")
        return self

    @property
    def generation_prompt(self) -> bool:
        """Whether the template opens the answer."""
        return not self.continue_final_message and self.add_generation_prompt is not False


class ChatRequest(Sampling, Conversation):
    max_tokens: Annotated[int | None, Field(ge=1, le=2**31 - 1)] = None
    max_completion_tokens: Annotated[
        int | None,
        Field(ge=1, le=2**31 - 1, description="Comes before max_tokens; the rest of the context if neither."),
    ] = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int | None, Field(ge=-1, le=2**31 - 1, description="With logprobs; -1 for all.")] = None
    return_prompt_text: bool | None = None
    parallel_tool_calls: Annotated[bool | None, Field(description="Without effect: there are no tools.")] = None
    tool_choice: Annotated[Literal["none"] | None, Field(description='"none"; others are not supported yet')] = None
    modalities: Annotated[list[Literal["text"]] | None, Field(max_length=1, description='["text"]')] = None
    include_reasoning: Annotated[Literal[True] | None, Field(description="true; false is not supported yet")] = None
    functions: NotYet = None
    function_call: NotYet = None
    reasoning_effort: NotYet = None
    verbosity: NotYet = None
    audio: NotYet = None
    prediction: NotYet = None
    web_search_options: NotYet = None
    moderation: NotYet = None
    prompt_cache_retention: NotYet = None
    return_assistant_tokens_mask: Annotated[
        Literal[False] | None, Field(description="false; true is not supported yet")
    ] = None

    @model_validator(mode="after")
    def _check_logprobs(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs is given and logprobs is not true; set logprobs")
        return self
