# SPDX-License-Identifier: Apache-2.0
"""The body of /v1/completions."""

from typing import Annotated, Self

from pydantic import Field, model_validator

from jaxserve.server.protocol.base import AS_WHOLE, Expected
from jaxserve.server.protocol.generated import with_unsupported
from jaxserve.server.protocol.long_values import LONG
from jaxserve.server.protocol.sampling import Sampling
from jaxserve.unsupported import COMPLETION_FIELDS

MAX_PROMPTS = 1024
MAX_CHOICES = 4096

Ids = Annotated[list[int], Field(fail_fast=True)]
Prompts = (
    str
    | Annotated[list[str], Field(fail_fast=True, max_length=MAX_PROMPTS)]
    | Ids
    | Annotated[list[Ids], Field(fail_fast=True, max_length=MAX_PROMPTS)]
)


def one_or_many(most: int, what: str) -> Expected:
    return Expected(f"a string, a list of token ids, or a list of up to {most} {what} that are either")


class CompletionRequest(with_unsupported(Sampling, COMPLETION_FIELDS)):
    prompt: Annotated[Prompts, one_or_many(MAX_PROMPTS, "prompts"), LONG]
    max_tokens: Annotated[
        int | None,
        Field(
            ge=0,
            le=2**31 - 1,
            description="Maximum number of tokens to generate, 16 by default; 0 is allowed with echo.",
        ),
        AS_WHOLE,
    ] = None
    logprobs: Annotated[
        int | None,
        Field(
            ge=0,
            le=2**31 - 1,
            description="Return the log probability of each token and of this many most likely tokens.",
        ),
        AS_WHOLE,
    ] = None
    best_of: Annotated[int | None, Field(ge=1, le=1, description="More than 1 is not supported."), AS_WHOLE] = None

    @model_validator(mode="after")
    def _check_scoring(self) -> Self:
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens is 0, which requires echo; raise it, or set echo")
        if self.max_tokens == 0 and (self.n or 1) > 1:
            raise ValueError("n is above 1 with max_tokens 0, which makes all choices equal; set n=1")
        return self


def as_list(prompts: str | list[str] | list[int] | list[list[int]]) -> list[str] | list[list[int]]:
    """All prompts of a body. A list of token ids is one prompt."""
    if isinstance(prompts, str):
        return [prompts]
    if prompts and isinstance(prompts[0], int):
        return [prompts]  # pyright: ignore[reportReturnType]
    return prompts  # pyright: ignore[reportReturnType]
