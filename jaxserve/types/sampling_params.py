# SPDX-License-Identifier: Apache-2.0
"""How to continue a prompt: SamplingParams and BeamSearchParams. Names, defaults and ranges are vLLM's.

What depends on a model (ids within its vocabulary, lengths) is checked when a request meets an engine.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Self, cast

from jaxserve.errors import RequestError
from jaxserve.types.checks import boolean, check_names, integer, is_decimal, items, number, refused, token_ids

MAX_SAMPLES = 16384
MAX_STOP_IDS = 128
MAX_BIASES = 1024
MAX_BAD_WORDS = 128  # token sequences
BAD_WORD_TOKENS = 32
MIN_TEMPERATURE = 1e-2  # below it a random row's logits overflow; below GREEDY_TEMPERATURE it means greedy
GREEDY_TEMPERATURE = 1e-5


class RequestOutputKind(Enum):
    CUMULATIVE = 0  # every output holds all so far
    DELTA = 1  # every output holds what is new
    FINAL_ONLY = 2  # one output, at the end


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to continue a prompt. Every value is checked here; a bad one is a RequestError that names it."""

    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    bad_words: Sequence[str] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE
    logit_bias: Mapping[int, float] | None = None
    allowed_token_ids: Sequence[int] | None = None
    skip_reading_prefix_cache: bool | None = None

    def __new__(cls, *args: object, **given: object) -> Self:
        check_names(cls, given)
        if args:
            raise RequestError("sampling_params", "sampling parameters are given without names", "name each: n=1")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        put = self._put
        put("n", integer("n", self.n, low=1, high=MAX_SAMPLES))
        for name in ("presence_penalty", "frequency_penalty"):
            put(name, number(name, getattr(self, name), low=-2, high=2))
        put("repetition_penalty", number("repetition_penalty", self.repetition_penalty, above=0))
        put("temperature", number("temperature", self.temperature, low=0, high=2))
        put("top_p", number("top_p", self.top_p, above=0, high=1))
        top_k = integer("top_k", self.top_k, low=-1, high=2**31 - 1)
        put("top_k", max(top_k, 0))
        put("min_p", number("min_p", self.min_p, low=0, high=1))
        if self.seed is not None:
            seed = integer("seed", self.seed, low=-(2**63), high=2**64 - 1)
            put("seed", None if seed == -1 else seed)
        self._check_stops()
        self._check_ids()
        self._check_lengths()
        for name in ("ignore_eos", "detokenize", "skip_special_tokens", "spaces_between_special_tokens"):
            boolean(name, getattr(self, name))
        boolean("include_stop_str_in_output", self.include_stop_str_in_output)
        if self.skip_reading_prefix_cache is not None:
            boolean("skip_reading_prefix_cache", self.skip_reading_prefix_cache)
        if not isinstance(self.output_kind, RequestOutputKind):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise refused("output_kind", self.output_kind, "a RequestOutputKind")
        if self.temperature < GREEDY_TEMPERATURE:
            if self.n > 1:
                raise RequestError("n", f"n is {self.n} with greedy sampling: all samples would be equal", "give n=1")
            for name, off in (("temperature", 0.0), ("top_p", 1.0), ("top_k", 0), ("min_p", 0.0)):
                put(name, off)
        put("temperature", max(self.temperature, MIN_TEMPERATURE) if self.temperature else 0.0)

    def _put(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def _check_stops(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else items("stop", self.stop)
        for text in stop:
            if not isinstance(text, str) or not text:
                raise refused("stop", text, "strings that are not empty")
        if stop and not self.detokenize:
            raise RequestError("stop", "stop strings need the text, and detokenize is false", "give stop_token_ids")
        self._put("stop", tuple(dict.fromkeys(stop)))
        words = (self.bad_words,) if isinstance(self.bad_words, str) else items("bad_words", self.bad_words)
        for text in words:
            if not isinstance(text, str) or not text:
                raise refused("bad_words", text, "strings that are not empty")
        if len(words) > MAX_BAD_WORDS:
            raise RequestError("bad_words", f"bad_words has {len(words)} entries", f"give at most {MAX_BAD_WORDS}")
        self._put("bad_words", tuple(words))

    def _check_ids(self) -> None:
        ids = token_ids("stop_token_ids", self.stop_token_ids)
        if len(ids) > MAX_STOP_IDS:
            problem = f"stop_token_ids has {len(ids)} entries"
            raise RequestError("stop_token_ids", problem, f"give at most {MAX_STOP_IDS}")
        self._put("stop_token_ids", ids)
        if self.allowed_token_ids is not None:
            allowed = token_ids("allowed_token_ids", self.allowed_token_ids)
            if not allowed:
                raise RequestError("allowed_token_ids", "allowed_token_ids is empty", "allow at least one token")
            self._put("allowed_token_ids", allowed)
        if self.logit_bias is not None:
            if not isinstance(self.logit_bias, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
                raise refused("logit_bias", self.logit_bias, "a mapping of token ids to numbers")
            if len(self.logit_bias) > MAX_BIASES:
                problem = f"logit_bias has {len(self.logit_bias)} entries"
                raise RequestError("logit_bias", problem, f"give at most {MAX_BIASES}")
            pairs: dict[int, float] = {}
            for key, value in self.logit_bias.items():
                token = int(key) if isinstance(key, str) and is_decimal(key) else key
                [token] = token_ids("logit_bias", [token])
                pairs[token] = min(max(number("logit_bias", value), -100.0), 100.0)
            self._put("logit_bias", pairs or None)

    def _check_lengths(self) -> None:
        if self.max_tokens is not None:
            self._put("max_tokens", integer("max_tokens", self.max_tokens, low=1, high=2**31 - 1))
        self._put("min_tokens", integer("min_tokens", self.min_tokens, low=0, high=2**31 - 1))
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            problem = f"min_tokens is {self.min_tokens}, above max_tokens {self.max_tokens}"
            raise RequestError("min_tokens", problem, "lower it")
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            if value is False:
                self._put(name, None)
            elif value is not None:
                self._put(name, 1 if value is True else integer(name, value, low=-1, high=2**31 - 1))

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @property
    def stops(self) -> tuple[str, ...]:
        return cast("tuple[str, ...]", self.stop)

    @property
    def penalized(self) -> bool:
        return bool(self.presence_penalty or self.frequency_penalty) or self.repetition_penalty != 1


@dataclass(frozen=True, kw_only=True)
class BeamSearchParams:
    """Keep the `beam_width` likeliest continuations; return them all, best first."""

    beam_width: int
    max_tokens: int
    ignore_eos: bool = False
    temperature: float = 0.0
    length_penalty: float = 1.0
    include_stop_str_in_output: bool = False

    def __new__(cls, *args: object, **given: object) -> Self:
        check_names(cls, given)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        integer("beam_width", self.beam_width, low=1, high=MAX_SAMPLES)
        integer("max_tokens", self.max_tokens, low=1, high=2**31 - 1)
        number("length_penalty", self.length_penalty, low=-100, high=100)
        boolean("ignore_eos", self.ignore_eos)
        boolean("include_stop_str_in_output", self.include_stop_str_in_output)
        if number("temperature", self.temperature, low=0, high=2) != 0:
            problem = f"temperature is {self.temperature}: beams are ranked by the model's own log-probabilities"
            raise RequestError("temperature", problem, "leave it at 0")
