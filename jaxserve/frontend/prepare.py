# SPDX-License-Identifier: Apache-2.0
"""Turns users' prompts and parameters into valid requests for an engine, and loads the tokenizer.

Everything is checked against the engine's limits before it is sent. The engine may be in another process, so only its
limits are used here.
"""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from numbers import Integral
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np

from convert.files import hub
from convert.gguf import folder as gguf
from jaxserve.config import EngineConfig
from jaxserve.engine.capacity import Limits
from jaxserve.engine.schedule import admission
from jaxserve.errors import CheckpointError, RequestError
from jaxserve.frontend import beam_search
from jaxserve.text import tokenizer as tokenizers
from jaxserve.text.tokenizer import Encoded, Tokenizer
from jaxserve.types.request import Request
from jaxserve.types.sampling_params import BeamSearchParams, SamplingParams


class ArrayLike(Protocol):
    """An array of numpy, jax or another library."""

    def __array__(self) -> np.ndarray: ...


type Prompt = str | Sequence[int] | ArrayLike | Mapping[str, Any]
"""Text, token ids, or {"prompt": text}, {"prompt_token_ids": ids} with an optional "cache_salt"."""

FORMS = "a string, a list of token ids, or a dict with prompt or prompt_token_ids"
KEYS = ("prompt", "prompt_token_ids", "cache_salt")


class Preparer:
    """Makes requests for one engine. Any thread may call it."""

    def __init__(
        self, tokenizer: Tokenizer | None, limits: Limits, *, defaults: Mapping[str, Any] | None = None
    ) -> None:
        self.tokenizer, self.limits = tokenizer, limits
        self._defaults = dict(defaults or {})
        self._ids = itertools.count()
        self._spelled: tuple[object, tuple[tuple[int, ...], ...]] = (None, ())  # the last bad_words and their ids

    def default_params(self) -> SamplingParams:
        """The defaults of the model's generation_config.json."""
        return self.params({})

    def params(self, values: Mapping[str, Any]) -> SamplingParams:
        """Parameters with these values, else the model's defaults."""
        return SamplingParams(**{**self._defaults, **values})

    def next_id(self) -> str:
        return str(next(self._ids))

    def prepare(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        **more: Any,
    ) -> Request:
        """A checked request. `more` are further fields of Request: deadline, embed, ..."""
        if params is None:
            params = SamplingParams(max_tokens=1) if more.get("embed") else self.default_params()
        if not isinstance(params, SamplingParams):  # pyright: ignore[reportUnnecessaryIsInstance]
            problem = f"sampling_params is of type {type(params).__name__}"
            raise RequestError("sampling_params", problem, "pass a SamplingParams")
        if priority and not self.limits.priority:
            problem = f"priority is {priority!r}, but the engine schedules requests in order of arrival"
            raise RequestError("priority", problem, 'start the engine with scheduling_policy="priority"')
        if params.stops and self.tokenizer is None:
            raise RequestError("stop", "stop strings need a tokenizer, but none is loaded", "use stop_token_ids")
        text, ids, salt = self._parsed(prompt)
        request = Request(
            id=self.next_id() if request_id is None else request_id,
            prompt_token_ids=ids,
            params=params,
            bad_word_ids=self._bad_word_ids(params),
            priority=priority,
            cache_salt=salt,
            prompt=text,
            **more,
        )
        admission.check(request, self.limits)
        return replace(request, prompt_token_ids=cast("Sequence[int]", np.array(ids, np.int32)))

    def prepare_beams(self, prompt: Prompt, params: BeamSearchParams, **more: Any) -> Request:
        """A checked request for a beam search that returns the log probabilities of all its candidates."""
        if not isinstance(params, BeamSearchParams):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise RequestError("params", f"params is of type {type(params).__name__}", "pass BeamSearchParams")
        shown = beam_search.sampling_params(params, logprobs=2 * params.beam_width)
        return self.prepare(prompt, shown, beam_search=params, **more)

    def prepare_all(
        self,
        prompts: Sequence[Prompt],
        params: Sequence[SamplingParams],
        *,
        priority: Sequence[int] | None = None,
        **more: Any,
    ) -> list[Request]:
        """One for each prompt. The error of a bad prompt gives its position."""
        if len(params) != len(prompts):
            problem = f"{len(params)} sampling_params for {len(prompts)} prompts"
            raise RequestError("sampling_params", problem, "pass one for all prompts, or one per prompt")
        if priority is not None and len(priority) != len(prompts):
            problem = f"{len(priority)} priorities for {len(prompts)} prompts"
            raise RequestError("priority", problem, "pass one per prompt")
        levels = itertools.repeat(0) if priority is None else priority
        return each_named(
            lambda each: self.prepare(each[0], each[1], priority=each[2], **more),
            list(zip(prompts, params, levels, strict=False)),
        )

    def _parsed(self, prompt: Prompt) -> tuple[str | None, Sequence[int], str | None]:
        """Text, ids, cache salt."""
        if isinstance(prompt, str):
            return prompt, self.encode(prompt), None
        if not isinstance(prompt, Mapping):
            if isinstance(prompt, Sequence) and prompt and not is_one(prompt):
                problem = f"the prompt begins with {prompt[0]!r:.40}: a list of prompts was passed as one prompt"
                raise RequestError("prompt", problem, f"pass {FORMS}")
            return None, token_ids(prompt), None
        for key in prompt:
            if key not in KEYS:
                raise RequestError("prompt", f"unknown prompt key {key!r}", f"known: {', '.join(KEYS)}")
        text, ids = prompt.get("prompt"), prompt.get("prompt_token_ids")
        if text is not None and not isinstance(text, str):
            raise RequestError("prompt", f"the prompt is of type {type(text).__name__}", f"pass {FORMS}")
        if ids is None:
            if text is None:
                raise RequestError("prompt", "the prompt has neither prompt nor prompt_token_ids", f"pass {FORMS}")
            ids = self.encode(text)
        return text, token_ids(ids), prompt.get("cache_salt")

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The ids of a prompt."""
        return self.encoded(text, add_special_tokens=add_special_tokens).ids

    def encoded(self, text: str, *, add_special_tokens: bool = True) -> Encoded:
        """A tokenized prompt. A text too long for any tokenization to fit is rejected before tokenizing."""
        if self.tokenizer is None:
            problem = "the prompt is text, but no tokenizer is loaded"
            raise RequestError("prompt", problem, "send token ids, or set tokenizer")
        longest = self.limits.max_model_len
        if len(text) > longest:
            least = self.tokenizer.text_length.fewest_tokens(text)
            if least > longest:
                problem = f"this model's maximum context length is {longest} tokens, but the prompt has {len(text)}"
                raise RequestError("prompt", f"{problem} characters, which are at least {least} tokens", "shorten it")
        return self.tokenizer.encoded(text, add_special_tokens=add_special_tokens)

    def _bad_word_ids(self, params: SamplingParams) -> tuple[tuple[int, ...], ...]:
        if not params.bad_words:
            return ()
        if self.tokenizer is None:
            raise RequestError("bad_words", "bad_words need a tokenizer, but none is loaded", "use logit_bias")
        words, ids = self._spelled
        if words is not params.bad_words:
            ids = self.tokenizer.bad_word_ids(params.bad_words)
            self._spelled = params.bad_words, ids
        return ids


def token_ids(given: object) -> Sequence[Any]:
    """A list of ids, from a sequence or an array; an array of int32 as it is. admission checks the values."""
    if type(given) is np.ndarray and (array := cast(Any, given)).dtype == np.int32 and array.ndim == 1:
        return array
    if hasattr(given, "__array__"):
        given = np.asarray(given)
        if given.ndim != 1:
            raise RequestError("prompt", f"the prompt is an array of shape {given.shape}", f"pass {FORMS}")
        return cast("list[Any]", given.tolist())
    if isinstance(given, str | bytes) or not isinstance(given, Sequence):
        raise RequestError("prompt", f"the prompt is of type {type(given).__name__}", f"pass {FORMS}")
    return list(cast("Sequence[Any]", given))


def is_one(prompts: object) -> bool:
    """Whether this is a single prompt, not a list of prompts. A list of ids is a single prompt."""
    if isinstance(prompts, str | bytes | Mapping):
        return True
    if hasattr(prompts, "__array__"):
        return np.ndim(cast(Any, prompts)) < 2
    if not isinstance(prompts, Sequence):
        return True  # rejected later, with the error for a prompt
    first = cast("Sequence[object]", prompts)[:1]
    return bool(first) and isinstance(first[0], Integral | float)


def listed(prompts: Any) -> list[Any]:
    return [prompts] if is_one(prompts) else list(prompts)


def each_named[T, R](make: Callable[[T], R], items: Sequence[T], *, what: str = "prompt") -> list[R]:
    """`make` of each. If there are several items, a RequestError gives the position of the bad one."""
    made: list[R] = []
    for place, item in enumerate(items):
        try:
            made.append(make(item))
        except RequestError as error:
            if len(items) == 1:
                raise
            raise type(error)(error.field, f"{what} {place}: {error.problem}", error.hint) from None
    return made


def by_prompt(params: Any, count: int, default: Callable[[], SamplingParams]) -> list[Any]:
    """The parameters of each of `count` prompts: one for all, or a list; None for the model's defaults."""
    if params is None:
        params = default()
    if isinstance(params, Iterable) and not isinstance(params, str | Mapping):
        return list(cast("Iterable[Any]", params))
    return [params] * count


def preparer_for(
    engine_limits: Limits,
    tokenizer: Tokenizer | None,
    *,
    defaults: Mapping[str, Any],
    also_ends: Callable[[list[int]], object],
) -> Preparer:
    """A Preparer for an engine. `also_ends` passes the tokenizer's end-of-text tokens to the engine."""
    limits = engine_limits
    if tokenizer is not None:
        ends = sorted(token for token in tokenizer.eos_token_ids if 0 <= token < limits.vocab_size)
        also_ends(ends)
        limits = replace(limits, eos_token_ids=limits.eos_token_ids.union(ends))
    return Preparer(tokenizer, limits, defaults=defaults)


def tokenizer_of(config: EngineConfig, *, loads_model: bool, model_folder: Path | None = None) -> Tokenizer | None:
    """The configured tokenizer; None if skip_tokenizer_init is set, or if a program passes the weights and no tokenizer
    is configured.

    `model_folder`: the model's folder, if already resolved.
    """
    if config.skip_tokenizer_init:
        return None
    source = config.tokenizer or config.model
    folder = gguf.resolved(Path(source).expanduser())
    if not folder.is_dir():
        if config.tokenizer is None and not loads_model:
            return None
        if config.tokenizer is None and model_folder is not None:
            folder = model_folder
        else:
            cache = Path(config.download_dir).expanduser() if config.download_dir else None
            revision = config.revision if config.tokenizer is None else None
            folder = hub.fetch(source, revision=revision, cache_dir=cache, weights=False)
    try:
        return tokenizers.load(folder)
    except CheckpointError as error:
        hint = "set tokenizer, or set skip_tokenizer_init=True and send prompts as token ids"
        raise CheckpointError(error.problem, hint) from None
