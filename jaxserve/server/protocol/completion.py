# SPDX-License-Identifier: Apache-2.0
"""The body of /v1/completions."""

from typing import Annotated, Self

from pydantic import Field, model_validator

from jaxserve.server.protocol.base import NotYet
from jaxserve.server.protocol.sampling import Sampling

MAX_PROMPTS = 1024
MAX_CHOICES = 4096

Ids = Annotated[list[int], Field(fail_fast=True)]
Prompts = (
    str
    | Annotated[list[str], Field(fail_fast=True, max_length=MAX_PROMPTS)]
    | Ids
    | Annotated[list[Ids], Field(fail_fast=True, max_length=MAX_PROMPTS)]
)
FORMS = "a string, a list of token ids, or a list of either, of up to"
PROMPTS = f"{FORMS} {MAX_PROMPTS} prompts"


class CompletionRequest(Sampling):
    prompt: Annotated[Prompts, Field(description=PROMPTS)]
    max_tokens: Annotated[int | None, Field(ge=0, le=2**31 - 1, description="16 if not given.")] = None
    logprobs: Annotated[int | None, Field(ge=0, le=2**31 - 1, description="How many of the likeliest tokens.")] = None
    best_of: Annotated[int | None, Field(ge=1, le=1, description="More are not supported.")] = None
    suffix: NotYet = None
    prompt_embeds: NotYet = None

    @model_validator(mode="after")
    def _check_scoring(self) -> Self:
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens is 0, which asks for nothing without echo; raise it, or set echo")
        if self.max_tokens == 0 and (self.n or 1) > 1:
            raise ValueError("n is above 1 with max_tokens 0: all would be the same; give n=1")
        return self


def as_list(prompts: str | list[str] | list[int] | list[list[int]]) -> list[str] | list[list[int]]:
    """All prompts of a body. A list of ids is one."""
    if isinstance(prompts, str):
        return [prompts]
    if prompts and isinstance(prompts[0], int):
        return [prompts]  # pyright: ignore[reportReturnType]
    return prompts  # pyright: ignore[reportReturnType]
