# SPDX-License-Identifier: Apache-2.0
"""Checks on the host that an engine can serve a request as sent: all token ids and lengths against its limits.

On the device, an id out of range raises no error: it reads or writes another request's data.
"""

import math
from collections.abc import Collection, Sequence
from numbers import Integral, Real
from typing import Any, cast

import numpy as np

from jaxserve.engine.capacity import Limits
from jaxserve.engine.schedule.sequence import stops_of
from jaxserve.errors import RequestError, one_line
from jaxserve.types.checks import Biases, TokenIds, TopTokens
from jaxserve.types.request import POOLS, Request
from jaxserve.types.sampling_params import BAD_WORD_TOKENS, FIELDS, MAX_BAD_WORDS, BeamSearchParams

MAX_SALT = 128
_TOKEN_IDS = tuple(each.name for each in FIELDS if isinstance(each.kind, TokenIds | Biases))
_TOP_TOKENS = tuple(each.name for each in FIELDS if isinstance(each.kind, TopTokens))


def check(request: Request, limits: Limits) -> None:
    """Raises a RequestError that names the field, its value and the limit."""
    params = request.params
    _check_kinds(request)
    if request.embed:
        _check_embeds(request)
    elif request.pool != "last":
        raise RequestError("pool", f"pool is {_shown(request.pool)}, but embed is not set", "set embed")
    elif not limits.generates:
        problem = "this model has no language-model head: it cannot generate text or score tokens"
        raise RequestError("model", problem, "use it for embeddings, classification or reranking")
    _check_prompt(request, limits)
    if request.beam_search is not None:
        _check_beams(request.beam_search, limits)
    if params.n > limits.max_num_seqs:
        problem = f"n is {params.n}, but the engine runs at most {limits.max_num_seqs} sequences at once"
        raise RequestError("n", problem, f"lower it to {limits.max_num_seqs} or less")
    for name in _TOKEN_IDS:
        _check_ids(name, getattr(params, name) or (), limits)
    _check_bad_words(request.bad_word_ids, limits)
    most = limits.vocab_size if limits.max_logprobs == -1 else limits.max_logprobs
    for name in _TOP_TOKENS:
        value = getattr(params, name)
        if value is not None and (limits.vocab_size if value == -1 else value) > most:
            asked = f"{value} (all {limits.vocab_size})" if value == -1 else str(value)
            problem = f"{name} is {asked}, above the engine's max_logprobs {most}"
            raise RequestError(name, problem, f"ask for at most {most}")
    room = limits.max_model_len - len(request.prompt_token_ids)
    if params.min_tokens > max(room, 0):
        problem = f"min_tokens is {params.min_tokens}, but the prompt leaves room for only {max(room, 0)}"
        raise RequestError("min_tokens", problem, "lower it")
    if params.min_tokens:
        _check_something_is_left(request, limits)


def _check_something_is_left(request: Request, limits: Limits) -> None:
    """Until min_tokens are generated, stop tokens are masked: at least one other token must remain."""
    stops, allowed = stops_of(request, limits), request.params.allowed_token_ids
    left = limits.vocab_size - len(stops) if allowed is None else len(set(allowed) - stops)
    if left <= 0:
        problem = f"min_tokens is {request.params.min_tokens}, but every allowed token ends the text"
        raise RequestError("min_tokens", problem, "allow other tokens, or set min_tokens to 0")


def _check_kinds(request: Request) -> None:
    """Check the fields outside the sampling parameters, which check themselves."""
    names = ("id", "tenant", "cache_salt", "priority", "deadline")
    values: dict[str, object] = {name: getattr(request, name) for name in names}
    for name in ("id", "tenant"):
        if not isinstance(values[name], str):
            raise _refused("request_id" if name == "id" else name, values[name], "a string")
    salt, priority, deadline = values["cache_salt"], values["priority"], values["deadline"]
    if salt is not None and not (isinstance(salt, str) and 0 < len(salt) <= MAX_SALT):
        raise _refused("cache_salt", salt, f"a string of 1 to {MAX_SALT} characters")
    if isinstance(priority, bool) or not isinstance(priority, int) or not -(2**63) <= priority < 2**63:
        raise _refused("priority", priority, "a whole number of at most 64 bits")
    if deadline is not None and not (isinstance(deadline, Real) and math.isfinite(deadline)):
        raise _refused("deadline", deadline, "a time on the monotonic clock")


def _check_embeds(request: Request) -> None:
    for each in FIELDS:
        value = getattr(request.params, each.name)
        if value != each.default and not each.embeds:
            problem = f"{each.name} is {_shown(value)}, but an embedding generates nothing"
            raise RequestError(each.name, problem, "remove it")
    if request.pool not in POOLS:
        raise _refused("pool", request.pool, f"one of {', '.join(POOLS)}")
    if request.score_only:
        raise RequestError("embed", "embed and score_only are both set", "ask for one of them")


def _check_beams(params: BeamSearchParams, limits: Limits) -> None:
    """Check that the engine can return enough candidates and run all beams."""
    width = params.beam_width
    if limits.max_logprobs != -1 and 2 * width > limits.max_logprobs:
        problem = f"beam_width is {width}, and twice as many log probabilities exceed max_logprobs"
        raise RequestError("beam_width", f"{problem} {limits.max_logprobs}", "lower it, or raise max_logprobs")
    if width > limits.max_num_seqs:
        problem = f"beam_width is {width}, but the engine runs at most {limits.max_num_seqs} sequences at once"
        raise RequestError("beam_width", problem, "lower it")


def _check_prompt(request: Request, limits: Limits) -> None:
    prompt = cast(object, request.prompt_token_ids)
    if isinstance(prompt, str | bytes | bytearray) or not isinstance(prompt, Sequence | np.ndarray):
        raise _refused("prompt", prompt, "a list of token ids")
    count = len(request.prompt_token_ids)
    if not count:
        raise RequestError("prompt", "the prompt is empty", "give at least one token")
    longest, use = limits.max_model_len, "embedded" if request.embed else "scored"
    if request.generates:
        longest, use = longest - 1, "continued"
    if count > longest:
        problem = f"the prompt has {count} tokens, but at most {longest} can be {use}"
        raise RequestError("prompt", problem, "shorten it, or start the engine with a larger max_model_len")
    _check_ids("prompt", request.prompt_token_ids, limits)


def _check_ids(name: str, ids: Collection[int], limits: Limits) -> None:
    """Uses only what runs in C, since prompts are long."""
    array: Any = ids
    if getattr(array, "dtype", None) == np.int32:  # it holds nothing but whole numbers
        ids = (int(array.min()), int(array.max())) if len(ids) else ()
    kinds = set(map(type, ids))
    if bool in kinds or not all(issubclass(kind, Integral) for kind in kinds):
        bad = next(token for token in ids if isinstance(token, bool) or not isinstance(token, Integral))
        raise RequestError(name, f"{name} contains {_shown(bad)}", "use whole numbers as token ids")
    for token in (min(ids), max(ids)) if kinds else ():
        if not 0 <= token < limits.vocab_size:
            problem = f"{name} contains token id {_shown(int(token))}, but valid ids are 0 to {limits.vocab_size - 1}"
            raise RequestError(name, problem, "use token ids of this model")


def _check_bad_words(words: tuple[tuple[int, ...], ...], limits: Limits) -> None:
    if len(words) > MAX_BAD_WORDS:
        problem = f"bad_words expands to {len(words)} token sequences"
        raise RequestError("bad_words", problem, f"use at most {MAX_BAD_WORDS} sequences")
    for word in words:
        if not 0 < len(word) <= BAD_WORD_TOKENS:
            problem = f"bad_words has a sequence of {len(word)} tokens"
            raise RequestError("bad_words", problem, f"use sequences of 1 to {BAD_WORD_TOKENS} tokens")
        _check_ids("bad_words", word, limits)


def _refused(name: str, value: object, wanted: str) -> RequestError:
    return RequestError(name, f"{name} is {_shown(value)}, expected {wanted}", "correct the value")


def _shown(value: object) -> str:
    if isinstance(value, int) and abs(value) >= 2**128:  # Python refuses to write thousands of digits
        return "a number of more than 128 bits"
    return one_line(repr(value)[:200], limit=60)
