# SPDX-License-Identifier: Apache-2.0
"""How to continue a prompt: SamplingParams and BeamSearchParams. Names, defaults and ranges are vLLM's.

SamplingParams is the one declaration of every sampling parameter: checks, request bodies, defaults that come with a
model, the numbers that a device gets and the documentation follow from `FIELDS`. What depends on a model (ids within
its vocabulary, lengths) is checked when a request meets an engine.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Self, cast

from jaxserve.errors import RequestError
from jaxserve.types.checks import (
    INT32_MAX,
    Biases,
    Boolean,
    Choice,
    Integer,
    Number,
    Strings,
    TokenIds,
    TopTokens,
    check_names,
)
from jaxserve.types.parameters import Acts, declared, parameter

MAX_SAMPLES = 16384
MAX_STOP_IDS = 128
MAX_BIASES = 1024
MAX_BAD_WORDS = 128  # token sequences
BAD_WORD_TOKENS = 32
MIN_TEMPERATURE = 1e-2  # below it a random row's logits overflow; below GREEDY_TEMPERATURE it means greedy
GREEDY_TEMPERATURE = 1e-5


class RequestOutputKind(Enum):
    CUMULATIVE = 0  # every output holds everything so far
    DELTA = 1  # every output holds what is new
    FINAL_ONLY = 2  # one output, at the end


def _settled(temperature: float) -> float:
    return 0.0 if temperature < GREEDY_TEMPERATURE else max(temperature, MIN_TEMPERATURE)


def _without_repeats(texts: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(texts))


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to continue a prompt. Every value is checked here; a bad one is a RequestError that names it."""

    n: int = parameter(1, Integer(1, MAX_SAMPLES), "Number of completions to generate for the prompt.", embeds=False)
    presence_penalty: float = parameter(
        0.0,
        Number(low=-2, high=2),
        "Subtracted from the logits of tokens that were generated at least once.",
        acts=Acts.CONTROL,
        embeds=False,
    )
    frequency_penalty: float = parameter(
        0.0,
        Number(low=-2, high=2),
        "Subtracted from the logits of generated tokens once for each time they occurred.",
        acts=Acts.CONTROL,
        embeds=False,
    )
    repetition_penalty: float = parameter(
        1.0,
        Number(above=0),
        "Divides positive logits of tokens in the prompt or the completion, and multiplies negative ones.",
        acts=Acts.CONTROL,
        from_model=True,
    )
    temperature: float = parameter(
        1.0,
        Number(low=0, high=2),
        "Divides the logits: higher is more random, 0 always takes the most likely token.",
        acts=Acts.ROW,
        dtype="float32",
        off=0.0,
        then=_settled,
        from_model=True,
    )
    top_p: float = parameter(
        1.0,
        Number(above=0, high=1),
        "Sample only from the most likely tokens whose probabilities add up to this; 1 for all.",
        acts=Acts.ROW,
        dtype="float32",
        from_model=True,
    )
    top_k: int = parameter(
        0,
        Integer(-1, INT32_MAX),
        "Sample only from this many most likely tokens; 0 or -1 for all.",
        acts=Acts.ROW,
        dtype="int32",
        then=lambda top_k: max(top_k, 0),
        from_model=True,
    )
    min_p: float = parameter(
        0.0,
        Number(low=0, high=1),
        "Sample only from tokens at least this likely relative to the most likely one; 0 for all.",
        acts=Acts.ROW,
        dtype="float32",
        from_model=True,
    )
    seed: int | None = parameter(
        None,
        Integer(-(2**63), 2**63 - 1),
        "Makes sampling repeatable; without it, or with -1, the engine picks one.",
        optional=True,
        then=lambda seed: None if seed == -1 else seed,
    )
    stop: str | Sequence[str] | None = parameter(
        None,
        Strings(alone=True),
        "Strings that end the completion.",
        acts=Acts.TEXT,
        then=_without_repeats,
        embeds=False,
        beams=False,
    )
    stop_token_ids: Sequence[int] | None = parameter(
        None, TokenIds(most=MAX_STOP_IDS), "Tokens that end the completion.", embeds=False, beams=False
    )
    bad_words: Sequence[str] | None = parameter(
        None, Strings(most=MAX_BAD_WORDS), "Strings that are never generated.", acts=Acts.CONTROL, embeds=False
    )
    ignore_eos: bool = parameter(False, Boolean(), "Continue after the model's end-of-text token.")
    max_tokens: int | None = parameter(
        16,
        Integer(1, INT32_MAX),
        "Maximum number of tokens to generate; None for as many as the context holds.",
        optional=True,
        sent=False,
    )
    min_tokens: int = parameter(
        0,
        Integer(0, INT32_MAX),
        "Minimum number of tokens to generate before a stop token or the end of the text is allowed.",
        acts=Acts.CONTROL,
        embeds=False,
    )
    logprobs: int | None = parameter(
        None,
        TopTokens(),
        "Return the log probability of each token and of this many most likely tokens; -1 for all.",
        optional=True,
        sent=False,
        embeds=False,
    )
    prompt_logprobs: int | None = parameter(
        None,
        TopTokens(),
        "Return the log probability of each prompt token and of this many most likely tokens; -1 for all.",
        optional=True,
        embeds=False,
        beams=False,
    )
    detokenize: bool = parameter(True, Boolean(), "Return text, not only token ids.", acts=Acts.TEXT, sent=False)
    skip_special_tokens: bool = parameter(True, Boolean(), "Leave special tokens out of the text.", acts=Acts.TEXT)
    spaces_between_special_tokens: bool = parameter(
        True, Boolean(), "Put spaces between special tokens in the text.", acts=Acts.TEXT
    )
    include_stop_str_in_output: bool = parameter(
        False, Boolean(), "Keep the stop string or stop token at the end of the text.", acts=Acts.TEXT
    )
    output_kind: RequestOutputKind = parameter(  # noqa: RUF009 - what is shared is an Enum member
        RequestOutputKind.CUMULATIVE,
        Choice(RequestOutputKind),
        "What each output holds: everything so far, only what is new; or only one output, at the end.",
        sent=False,
    )
    logit_bias: Mapping[int, float] | None = parameter(
        None,
        Biases(most=MAX_BIASES, low=-100, high=100),
        "Added to the logits of the given tokens, clipped to -100 to 100.",
        acts=Acts.CONTROL,
        optional=True,
        embeds=False,
    )
    allowed_token_ids: Sequence[int] | None = parameter(
        None, TokenIds(least=1), "Sample only from these tokens.", acts=Acts.MASK, optional=True, embeds=False
    )
    skip_reading_prefix_cache: bool | None = parameter(
        None,
        Boolean(),
        "Compute the whole prompt even if its beginning is cached.",
        optional=True,
        sent=False,
    )

    def __new__(cls, *args: object, **given: object) -> Self:
        check_names(cls, given)
        if args:
            raise RequestError("sampling_params", "sampling parameters must be passed by name", "write n=1")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        put = object.__setattr__
        for each in FIELDS:
            put(self, each.name, each.check(getattr(self, each.name)))
        if self.stop and not self.detokenize:
            raise RequestError("stop", "stop strings need the text, but detokenize is false", "use stop_token_ids")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            problem = f"min_tokens is {self.min_tokens}, above max_tokens {self.max_tokens}"
            raise RequestError("min_tokens", problem, "lower it")
        if self.greedy:
            if self.n > 1:
                problem = f"n is {self.n} with greedy sampling: all samples would be equal"
                raise RequestError("n", problem, "set n=1, or use a temperature above 0")
            for each in FIELDS:
                if each.acts is Acts.ROW:
                    put(self, each.name, each.off)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @property
    def stops(self) -> tuple[str, ...]:
        return cast("tuple[str, ...]", self.stop)

    @property
    def penalized(self) -> bool:
        return bool(self.presence_penalty or self.frequency_penalty) or self.repetition_penalty != 1


FIELDS = declared(SamplingParams)


@dataclass(frozen=True, kw_only=True)
class BeamSearchParams:
    """Keep the `beam_width` most likely continuations and return them all, best first."""

    beam_width: int
    max_tokens: int
    ignore_eos: bool = parameter(False, Boolean(), "Continue after the model's end-of-text token.")
    temperature: float = parameter(0.0, Number(low=0, high=2), "Must be 0.", sent=False)
    length_penalty: float = parameter(
        1.0,
        Number(low=-100, high=100),
        "With use_beam_search: beams are ranked by log probability / length ** this.",
    )
    include_stop_str_in_output: bool = parameter(False, Boolean(), "Keep the stop token at the end of the text.")

    def __new__(cls, *args: object, **given: object) -> Self:
        check_names(cls, given)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        Integer(1, MAX_SAMPLES)("beam_width", self.beam_width)
        Integer(1, INT32_MAX)("max_tokens", self.max_tokens)
        for each in BEAM_FIELDS:
            each.check(getattr(self, each.name))
        if self.temperature != 0:
            problem = f"temperature is {self.temperature}, but beams are ranked by the model's own log probabilities"
            raise RequestError("temperature", problem, "leave it at 0")


BEAM_FIELDS = declared(BeamSearchParams)
