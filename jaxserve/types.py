# SPDX-License-Identifier: Apache-2.0
"""What goes into an engine and what comes out of it. Plain data: no jax, no tokenizer.

    SamplingParams  how to continue a prompt, with vLLM's names, defaults and ranges; checked when made
    Request         a tokenized prompt with its parameters, as an engine takes it
    Update          what one step did for one sample of a request
    RequestOutput   what users see: text, tokens and log-probabilities of all samples so far

What depends on a model (ids within its vocabulary, lengths) is checked when a request meets an engine.
"""

import math
import numbers
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from enum import Enum
from typing import TYPE_CHECKING, Any, Literal, Self, cast

import msgspec

from jaxserve.errors import RequestError

if TYPE_CHECKING:
    import numpy as np

# vLLM's names of what may come: of sampling parameters, then of settings.
NOT_YET = frozenset(
    (
        *("structured_outputs", "guided_decoding", "logprob_token_ids", "flat_logprobs", "thinking_token_budget"),
        *("repetition_detection", "logits_processors", "best_of", "truncate_prompt_tokens", "extra_args"),
        *("quantization", "enable_lora", "max_loras", "speculative_config", "kv_cache_dtype", "enforce_eager"),
        *("pipeline_parallel_size", "data_parallel_size", "swap_space", "cpu_offload_gb"),
    )
)
MAX_SAMPLES = 16384
MAX_STOP_IDS = 128
MAX_BIASES = 1024
MAX_BAD_WORDS = 128  # token sequences
BAD_WORD_TOKENS = 32
MIN_TEMPERATURE = 1e-2  # below it a random row's logits overflow; below GREEDY_TEMPERATURE it means greedy
GREEDY_TEMPERATURE = 1e-5

type FinishReason = Literal["stop", "length", "abort", "error"]


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
        put("n", _integer("n", self.n, low=1, high=MAX_SAMPLES))
        for name in ("presence_penalty", "frequency_penalty"):
            put(name, number(name, getattr(self, name), low=-2, high=2))
        put("repetition_penalty", number("repetition_penalty", self.repetition_penalty, above=0))
        put("temperature", number("temperature", self.temperature, low=0, high=2))
        put("top_p", number("top_p", self.top_p, above=0, high=1))
        top_k = _integer("top_k", self.top_k, low=-1, high=2**31 - 1)
        put("top_k", max(top_k, 0))
        put("min_p", number("min_p", self.min_p, low=0, high=1))
        if self.seed is not None:
            seed = _integer("seed", self.seed, low=-(2**63), high=2**64 - 1)
            put("seed", None if seed == -1 else seed)
        self._check_stops()
        self._check_ids()
        self._check_lengths()
        for name in ("ignore_eos", "detokenize", "skip_special_tokens", "spaces_between_special_tokens"):
            _boolean(name, getattr(self, name))
        _boolean("include_stop_str_in_output", self.include_stop_str_in_output)
        if self.skip_reading_prefix_cache is not None:
            _boolean("skip_reading_prefix_cache", self.skip_reading_prefix_cache)
        if not isinstance(self.output_kind, RequestOutputKind):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise _refused("output_kind", self.output_kind, "a RequestOutputKind")
        if self.temperature < GREEDY_TEMPERATURE:
            if self.n > 1:
                raise RequestError("n", f"n is {self.n} with greedy sampling: all samples would be equal", "give n=1")
            for name, off in (("temperature", 0.0), ("top_p", 1.0), ("top_k", 0), ("min_p", 0.0)):
                put(name, off)
        put("temperature", max(self.temperature, MIN_TEMPERATURE) if self.temperature else 0.0)

    def _put(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def _check_stops(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else _items("stop", self.stop)
        for text in stop:
            if not isinstance(text, str) or not text:
                raise _refused("stop", text, "strings that are not empty")
        if stop and not self.detokenize:
            raise RequestError("stop", "stop strings need the text, and detokenize is false", "give stop_token_ids")
        self._put("stop", tuple(dict.fromkeys(stop)))
        words = (self.bad_words,) if isinstance(self.bad_words, str) else _items("bad_words", self.bad_words)
        for text in words:
            if not isinstance(text, str) or not text:
                raise _refused("bad_words", text, "strings that are not empty")
        if len(words) > MAX_BAD_WORDS:
            raise RequestError("bad_words", f"bad_words has {len(words)} entries", f"give at most {MAX_BAD_WORDS}")
        self._put("bad_words", tuple(words))

    def _check_ids(self) -> None:
        ids = _ids("stop_token_ids", self.stop_token_ids)
        if len(ids) > MAX_STOP_IDS:
            problem = f"stop_token_ids has {len(ids)} entries"
            raise RequestError("stop_token_ids", problem, f"give at most {MAX_STOP_IDS}")
        self._put("stop_token_ids", ids)
        if self.allowed_token_ids is not None:
            allowed = _ids("allowed_token_ids", self.allowed_token_ids)
            if not allowed:
                raise RequestError("allowed_token_ids", "allowed_token_ids is empty", "allow at least one token")
            self._put("allowed_token_ids", allowed)
        if self.logit_bias is not None:
            if not isinstance(self.logit_bias, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
                raise _refused("logit_bias", self.logit_bias, "a mapping of token ids to numbers")
            if len(self.logit_bias) > MAX_BIASES:
                problem = f"logit_bias has {len(self.logit_bias)} entries"
                raise RequestError("logit_bias", problem, f"give at most {MAX_BIASES}")
            pairs: dict[int, float] = {}
            for key, value in self.logit_bias.items():
                token = int(key) if isinstance(key, str) and _is_decimal(key) else key
                [token] = _ids("logit_bias", [token])
                pairs[token] = min(max(number("logit_bias", value), -100.0), 100.0)
            self._put("logit_bias", pairs or None)

    def _check_lengths(self) -> None:
        if self.max_tokens is not None:
            self._put("max_tokens", _integer("max_tokens", self.max_tokens, low=1, high=2**31 - 1))
        self._put("min_tokens", _integer("min_tokens", self.min_tokens, low=0, high=2**31 - 1))
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            problem = f"min_tokens is {self.min_tokens}, above max_tokens {self.max_tokens}"
            raise RequestError("min_tokens", problem, "lower it")
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            if value is False:
                self._put(name, None)
            elif value is not None:
                self._put(name, 1 if value is True else _integer(name, value, low=-1, high=2**31 - 1))

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
        _integer("beam_width", self.beam_width, low=1, high=MAX_SAMPLES)
        _integer("max_tokens", self.max_tokens, low=1, high=2**31 - 1)
        number("length_penalty", self.length_penalty, low=-100, high=100)
        _boolean("ignore_eos", self.ignore_eos)
        _boolean("include_stop_str_in_output", self.include_stop_str_in_output)
        if number("temperature", self.temperature, low=0, high=2) != 0:
            problem = f"temperature is {self.temperature}: beams are ranked by the model's own log-probabilities"
            raise RequestError("temperature", problem, "leave it at 0")


def check_names(kind: type, given: Mapping[str, object]) -> None:
    """That every name is a field of the dataclass."""
    known = [f.name for f in fields(cast(Any, kind))]
    for name in given:
        if name in NOT_YET:
            raise RequestError(name, f"{name} is not supported yet", "leave it out")
        if name not in known:
            close = get_close_matches(str(name), known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(known)}"
            raise RequestError(str(name), f"{name!r} is no field of {kind.__name__}", hint)


@dataclass(frozen=True, kw_only=True)
class Request:
    """A prompt as ids. `prompt_token_ids` and the ids in `bad_word_ids` are checked when it meets an engine."""

    id: str
    prompt_token_ids: Sequence[int]
    params: SamplingParams = field(default_factory=SamplingParams)
    bad_word_ids: tuple[tuple[int, ...], ...] = ()  # params.bad_words as ids
    priority: int = 0  # lower goes first, where the policy is "priority"
    cache_salt: str | None = None  # requests share cached prompts only with those of the same salt
    arrival: float = field(default_factory=time.monotonic)
    deadline: float | None = None  # on the monotonic clock
    score_only: bool = False  # nothing is generated: the prompt's log-probabilities are all that is wanted
    embed: bool = False  # nothing is generated: the last token's hidden state is all that is wanted

    @property
    def generates(self) -> bool:
        return not (self.score_only or self.embed)


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """How likely a token was, and the likeliest ones in its place, best first."""

    token: int
    logprob: float
    rank: int
    top_tokens: list[int]
    top_logprobs: list[float]


class Update(msgspec.Struct, array_like=True, kw_only=True):
    """What one step did for one sample. The last one of a sample has a finish_reason."""

    request_id: str
    index: int  # which of the n samples
    token_ids: list[int] = []
    logprobs: list[TokenLogprobs] | None = None  # of token_ids
    prompt_logprobs: list[TokenLogprobs] | None = None  # the next ones of the prompt, from its second token on
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None  # the token that ended it, other than the model's end of text
    error: str | None = None  # with finish_reason "error" or "abort": why
    num_cached_tokens: int = 0
    policy_version: int = 0  # of the weights
    embedding: bytes | None = None  # float32, little endian: the end of a request that wants it
    scheduled: float | None = None  # on a sample's first: when it got a row, on the monotonic clock


@dataclass(frozen=True, slots=True)
class Logprob:
    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


type PositionLogprobs = dict[int, Logprob]


@dataclass(slots=True)
class CompletionOutput:
    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[PositionLogprobs] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    error: str | None = None
    policy_version: int = 0

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass(slots=True)
class RequestOutput:
    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    prompt_logprobs: list[PositionLogprobs | None] | None = None  # None for the first token
    num_cached_tokens: int = 0
    embedding: "np.ndarray | None" = None  # float32 [hidden], of a request that wants it


@dataclass(slots=True)
class BeamSearchSequence:
    tokens: list[int]  # the prompt's and the generated ones
    logprobs: list[PositionLogprobs]
    cum_logprob: float = 0.0
    text: str | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None


@dataclass(slots=True)
class BeamSearchOutput:
    sequences: list[BeamSearchSequence]


# --- checks of one value --------------------------------------------------------------------------------------------


def _refused(name: str, value: object, wanted: str) -> RequestError:
    try:
        shown = repr(str(value)[:80])
    except ValueError:  # Python refuses to write integers of thousands of digits
        shown = "a number too long to print"
    return RequestError(name, f"{name} is {shown}, expected {wanted}", "correct the value")


def _integer(name: str, value: object, *, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or not low <= int(value) <= high:
        raise _refused(name, value, f"a whole number from {low} to {high}")
    return int(value)


def number(
    name: str, value: object, *, low: float = -math.inf, above: float = -math.inf, high: float = math.inf
) -> float:
    try:
        number = math.nan if isinstance(value, bool) or not isinstance(value, numbers.Real) else float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number) or not low <= number <= high or not (number > above):
        least = f" above {above:g}" if above > -math.inf else f" from {low:g}" if low > -math.inf else ""
        wanted = f"a finite number{least}" if high == math.inf else f"a number{least} to {high:g}"
        raise _refused(name, value, wanted)
    return number


def _boolean(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise _refused(name, value, "true or false")


def _items(name: str, value: object) -> tuple[object, ...]:
    if value is None:
        return ()
    if isinstance(value, str | bytes) or not isinstance(value, Sequence | set | frozenset):
        raise _refused(name, value, "a list")
    return tuple(cast("Sequence[object]", value))


def _ids(name: str, value: object) -> tuple[int, ...]:
    """Token ids without repetition; that a model has them is checked when it is known."""
    return tuple(dict.fromkeys(_integer(name, token, low=0, high=2**31 - 1) for token in _items(name, value)))


def _is_decimal(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) < 12
