# SPDX-License-Identifier: Apache-2.0
"""The fields shared by completions and chats: OpenAI's, and vLLM's additions.

The fields of sampling parameters are generated from the parameters' declarations.
"""

from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from jaxserve.server.protocol.base import AS_WHOLE, MAX_CALL_ID, Expected, Name, NeverTrue, RequestBody, Strict
from jaxserve.server.protocol.generated import with_parameters, with_unsupported
from jaxserve.types.sampling_params import BEAM_FIELDS, FIELDS
from jaxserve.unsupported import GENERATION_FIELDS

MAX_METADATA = 16
SENT = tuple(each.name for each in FIELDS if each.sent)


class StreamOptions(Strict):
    include_usage: Annotated[bool | None, Field(description="Send usage in a final chunk.")] = None
    continuous_usage_stats: Annotated[
        bool | None, Field(description="Send usage in every chunk; requires include_usage.")
    ] = None
    include_obfuscation: NeverTrue = None


class TextFormat(Strict):
    type: Annotated[Literal["text"], Field(description="Other types are not supported yet."), Expected('"text"')]


class Ordered(RequestBody):
    """A body with prompts: the options of encoding, id and priority, and OpenAI's fields that are accepted without
    effect."""

    user: Name | None = None
    metadata: Annotated[dict[Name, Any] | None, Field(max_length=MAX_METADATA)] = None
    store: NeverTrue = None
    service_tier: Annotated[
        Literal["auto", "default"] | None, Field(description="No effect."), Expected('"auto" or "default"')
    ] = None
    prompt_cache_key: Name | None = None
    safety_identifier: Name | None = None
    priority: Annotated[
        int | None,
        Field(ge=-(2**63), lt=2**63, description="Lower is served first; requires the scheduling policy priority."),
        AS_WHOLE,
    ] = None
    request_id: Annotated[
        str | None, Field(max_length=MAX_CALL_ID, description="Part of the response's id, unless X-Request-Id is sent.")
    ] = None

    add_special_tokens: bool | None = None
    truncate_prompt_tokens: Annotated[
        int | None,
        Field(ge=-1, le=2**31 - 1, description="Truncate the prompt to this many tokens; -1: to all that fit."),
        AS_WHOLE,
    ] = None
    truncation_side: Annotated[
        Literal["left", "right"] | None,
        Field(description="End of the prompt that is cut off; left by default."),
        Expected('"left" or "right"'),
    ] = None
    cache_salt: Annotated[
        str | None,
        Field(
            min_length=1,
            max_length=128,
            description="Cached prompts are shared only between requests of the same salt.",
        ),
    ] = None

    @model_validator(mode="after")
    def _check_request_id(self) -> Self:
        if self.request_id is not None and not self.request_id.isprintable():
            raise ValueError("request_id has characters that are not printable; remove them")
        return self


# Of two parameters of the same name, the later one describes the field.
_PARAMETERS = (*BEAM_FIELDS, *FIELDS)


class Sampling(with_unsupported(with_parameters(Ordered, _PARAMETERS), GENERATION_FIELDS)):
    if TYPE_CHECKING:  # the sampling parameters that are read here by name
        n: int | None
        prompt_logprobs: int | None
        skip_special_tokens: bool | None
        spaces_between_special_tokens: bool | None
        length_penalty: float | None

    echo: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stream_interval: Annotated[
        int | None,
        Field(ge=1, le=2**31 - 1, description="Number of tokens per chunk, after the first chunk."),
        AS_WHOLE,
    ] = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    response_format: Annotated[
        TextFormat | None,
        Field(description="Other types than text are not supported yet."),
        Expected('{"type": "text"}'),
    ] = None
    use_beam_search: Annotated[
        bool | None,
        Field(description="Beam search of width n: return the n most likely completions, best first. Not in a stream."),
    ] = None

    return_token_offsets: NeverTrue = None

    @model_validator(mode="after")
    def _check_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options requires stream=true; set stream, or remove stream_options")
        options = self.stream_options
        if options is not None and options.continuous_usage_stats and not options.include_usage:
            raise ValueError("stream_options.continuous_usage_stats requires include_usage; set include_usage")
        if self.prompt_logprobs is not None and self.stream:
            raise ValueError("prompt_logprobs cannot be streamed; remove it, or set stream to false")
        return self

    @property
    def sampling(self) -> dict[str, Any]:
        """The sampling parameters that have a value."""
        return self.given(*SENT)

    @model_validator(mode="after")
    def _check_beams(self) -> Self:
        if self.use_beam_search:
            if self.stream:
                raise ValueError("use_beam_search cannot be streamed; set stream to false")
            for each in FIELDS:
                value = getattr(self, each.name, None)
                if each.beams or value in (None, [], {}):
                    continue
                if each.check(value) not in (each.off, each.default):  # clients that always send defaults are served
                    hint = "remove it" if each.off in (None, ()) else f"remove it, or set it to {each.off:g}"
                    raise ValueError(f"{each.name} cannot be combined with use_beam_search; {hint}")
        elif self.length_penalty not in (None, 1):
            raise ValueError("length_penalty requires use_beam_search=true; set it, or remove length_penalty")
        return self

    def given(self, *names: str) -> dict[str, Any]:
        """The named fields that have a value."""
        return {name: value for name in names if (value := getattr(self, name)) is not None}
