# SPDX-License-Identifier: Apache-2.0
"""The fields that completions and chats share: OpenAI's, and those that vLLM added to them.

Ranges that SamplingParams or a model's limits have are theirs to check; here are types, and how much is taken at all.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from jaxserve.server.protocol.base import MAX_CALL_ID, Body, Name, NeverTrue, NotYet, Part
from jaxserve.server.protocol.bounds import MAX_VALUES
from jaxserve.types.sampling_params import MAX_BAD_WORDS, MAX_BIASES, MAX_STOP_IDS

MAX_STOPS = 16
MAX_STOP_LENGTH = 1024
MAX_METADATA = 16

# What would change which answers are the likeliest, with the values that do not.
NEUTRAL_FOR_BEAMS: dict[str, tuple[float, ...]] = {
    **dict.fromkeys(("temperature", "min_p", "presence_penalty", "frequency_penalty", "min_tokens"), (0,)),
    **dict.fromkeys(("top_p", "repetition_penalty"), (1,)),
    "top_k": (0, -1),
    **dict.fromkeys(("logit_bias", "allowed_token_ids", "bad_words", "stop", "stop_token_ids", "prompt_logprobs"), ()),
}

Text = Annotated[str, Field(max_length=MAX_STOP_LENGTH)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Count = Annotated[int, Field(ge=-(2**31), lt=2**31)]  # its range is checked where it is known


class StreamOptions(Part):
    include_usage: Annotated[bool | None, Field(description="A last chunk with the usage.")] = None
    continuous_usage_stats: Annotated[bool | None, Field(description="With include_usage: on every chunk.")] = None
    include_obfuscation: NeverTrue = None


class TextFormat(Part):
    type: Annotated[Literal["text"], Field(description='"text"; others are not supported yet')]


class Ordered(Body):
    """What OpenAI's clients may send and nothing here depends on; how a request is named and ranked; its prompts."""

    user: Name | None = None
    metadata: Annotated[dict[Name, Name] | None, Field(max_length=MAX_METADATA)] = None
    store: NeverTrue = None
    service_tier: Annotated[Literal["auto", "default"] | None, Field(description='"auto" or "default"')] = None
    prompt_cache_key: Name | None = None
    safety_identifier: Name | None = None
    priority: Annotated[
        int | None, Field(ge=-(2**63), lt=2**63, description="Lower goes first, if the engine ranks.")
    ] = None
    request_id: Annotated[
        str | None, Field(max_length=MAX_CALL_ID, description="Part of the answer's id, unless X-Request-Id is sent.")
    ] = None

    add_special_tokens: bool | None = None
    truncate_prompt_tokens: Annotated[
        int | None, Field(ge=-1, le=2**31 - 1, description="Keep so many of the prompt's tokens; -1: all that fit.")
    ] = None
    truncation_side: Annotated[
        Literal["left", "right"] | None, Field(description='"left" (the default) or "right": which end is cut off')
    ] = None
    cache_salt: Annotated[
        str | None, Field(min_length=1, max_length=128, description="Cached prompts are shared within one salt alone.")
    ] = None

    @model_validator(mode="after")
    def _check_request_id(self) -> Self:
        if self.request_id is not None and not self.request_id.isprintable():
            raise ValueError("request_id has characters that do not print; leave them out")
        return self


class Sampling(Ordered):
    n: Count | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Count | None = None
    min_p: float | None = None
    seed: Annotated[int | None, Field(ge=-(2**63), le=2**63 - 1)] = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: Annotated[dict[str, float] | None, Field(max_length=MAX_BIASES)] = None
    allowed_token_ids: Annotated[list[TokenId] | None, Field(fail_fast=True, max_length=MAX_VALUES)] = None
    bad_words: Annotated[list[Text] | None, Field(fail_fast=True, max_length=MAX_BAD_WORDS)] = None
    stop: Annotated[
        Text | Annotated[list[Text], Field(fail_fast=True, max_length=MAX_STOPS)] | None,
        Field(description=f"A string or a list of up to {MAX_STOPS} strings, of up to {MAX_STOP_LENGTH} characters."),
    ] = None
    stop_token_ids: Annotated[list[TokenId] | None, Field(fail_fast=True, max_length=MAX_STOP_IDS)] = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    min_tokens: Count | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    prompt_logprobs: Annotated[int | None, Field(ge=-1, le=2**31 - 1)] = None
    echo: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stream_interval: Annotated[
        int | None, Field(ge=1, le=2**31 - 1, description="Tokens to a chunk, after the first one.")
    ] = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    response_format: Annotated[
        TextFormat | None, Field(description='{"type": "text"}; others are not supported yet')
    ] = None
    use_beam_search: Annotated[
        bool | None,
        Field(description="The n likeliest answers that a beam search of width n finds, best first. Not in a stream."),
    ] = None
    length_penalty: Annotated[
        float | None,
        Field(ge=-100, le=100, description="With use_beam_search: beams rank by log-probability / length ** this."),
    ] = None

    structured_outputs: NotYet = None
    guided_json: NotYet = None
    guided_regex: NotYet = None
    guided_choice: NotYet = None
    guided_grammar: NotYet = None
    guided_decoding_backend: NotYet = None
    guided_whitespace_pattern: NotYet = None
    logits_processors: NotYet = None
    logprob_token_ids: NotYet = None
    thinking_token_budget: NotYet = None
    repetition_detection: NotYet = None
    routed_experts_prompt_start: NotYet = None
    return_token_offsets: NeverTrue = None
    session_id: NotYet = None
    kv_transfer_params: NotYet = None
    ec_transfer_params: NotYet = None
    vllm_xargs: NotYet = None

    @model_validator(mode="after")
    def _check_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is given and stream is not true; leave it out, or stream")
        options = self.stream_options
        if options is not None and options.continuous_usage_stats and not options.include_usage:
            raise ValueError("stream_options.continuous_usage_stats needs include_usage; set it")
        if self.prompt_logprobs is not None and self.stream:
            raise ValueError("prompt_logprobs is not given out in a stream; leave it out, or do not stream")
        return self

    @model_validator(mode="after")
    def _check_beams(self) -> Self:
        if self.use_beam_search:
            if self.stream:
                raise ValueError("use_beam_search gives nothing before its end; do not stream")
            for name, neutral in NEUTRAL_FOR_BEAMS.items():
                if getattr(self, name) not in (None, [], {}, *neutral):
                    hint = "leave it out" + (f", or set it to {neutral[0]}" if neutral else "")
                    raise ValueError(f"{name} does not combine with use_beam_search; {hint}")
        elif self.length_penalty not in (None, 1):
            raise ValueError("length_penalty ranks beams; set use_beam_search")
        return self

    def given(self, *names: str) -> dict[str, Any]:
        """Those of the fields that have a value, by name."""
        return {name: value for name in names if (value := getattr(self, name)) is not None}
