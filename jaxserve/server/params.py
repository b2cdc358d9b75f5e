# SPDX-License-Identifier: Apache-2.0
"""Turns the bodies of HTTP requests into requests for the engine: sampling parameters, token ids, names, deadlines.

`prepare` does the slow work, tokenizing and checking; run it in a thread. Fields that the body omits have the defaults
of the model's generation_config.json, then OpenAI's.
"""

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from aiohttp import web
from pydantic import BaseModel

from jaxserve.engine.capacity import Limits
from jaxserve.errors import RequestError
from jaxserve.frontend import beam_search
from jaxserve.frontend.prepare import Preparer
from jaxserve.server.config import UnknownFields
from jaxserve.server.errors import ApiError, bad_request
from jaxserve.server.protocol.base import MAX_CALL_ID, RequestBody, parse, unknown_fields
from jaxserve.server.protocol.bounds import SMALL
from jaxserve.server.protocol.sampling import Ordered, Sampling
from jaxserve.server.state import HELD, RECORD, SERVING, Serving
from jaxserve.types.parameters import Acts
from jaxserve.types.request import Pool, Request
from jaxserve.types.sampling_params import BEAM_FIELDS, FIELDS, BeamSearchParams, RequestOutputKind, SamplingParams

TIMEOUT_HEADER = "X-Request-Timeout"
SECONDS = re.compile(r"[0-9]{1,32}(\.[0-9]{1,32})?")
LONGEST_DEADLINE = 1e9  # seconds
MAX_TRUNCATED = 2**20  # tokens of a prompt before truncation
ID_CHARACTERS = frozenset("0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ._:-")


async def read[B: RequestBody](request: web.Request, kind: type[B]) -> B:
    """The parsed body of a request. Parses the raw bytes itself, since aiohttp's JSON parsing has different errors."""
    serving = request.app[SERVING]
    media = request.content_type
    if media != "application/json" and not media.endswith("+json"):
        raise bad_request(None, f"the body has content type {media}", "send JSON, with Content-Type: application/json")
    raw = await request.read()
    request[RECORD].body_size = len(raw)
    body = await parsed(request, kind, raw)
    del raw
    request[HELD].let_go()  # the answer may take long
    if body.model and serving.model_names and body.model not in serving.model_names:
        raise ApiError(404, f"The model `{_shown(body.model)}` does not exist.", param="model")
    return body


async def parsed[B: BaseModel](
    request: web.Request, kind: type[B], raw: bytes, *, policy: UnknownFields | None = None
) -> B:
    """The body, with its unknown fields noted, or refused if that is the policy. A large one is parsed in a thread."""
    serving = request.app[SERVING]
    work = partial(_parsed, kind, raw, policy or serving.ignored.policy)
    body, unknown = work() if len(raw) <= SMALL else await serving.workers.run_alone(len(raw), work)
    serving.ignored.note_fields(request, unknown)
    return body


def _parsed[B: BaseModel](kind: type[B], raw: bytes, policy: UnknownFields) -> tuple[B, dict[str, type[BaseModel]]]:
    body = parse(kind, raw, unknown=policy)
    return body, unknown_fields(body) if policy == "warn" else {}


def _shown(name: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in name[:80])


def model_name(serving: Serving, body: RequestBody) -> str:
    """The model's name as the client sent it, else the first served name."""
    return body.model or serving.model_names[0]


def answer_id(kind: str, request: web.Request, body: Ordered) -> str:
    """The response's id. The server never looks up anything by the part that the client sends."""
    sent = request.headers.get("X-Request-Id") or body.request_id or ""
    kept = "".join(c for c in sent[:MAX_CALL_ID] if c in ID_CHARACTERS)
    return f"{kind}-{kept or request[RECORD].id}"


def deadline(request: web.Request) -> float | None:
    """The request's deadline: the server's or the client's, whichever is earlier."""
    server = request.app[SERVING].deadline()
    sent = request.headers.get(TIMEOUT_HEADER)
    if sent is None:
        return server
    seconds = float(sent) if SECONDS.fullmatch(sent) else 0.0
    if seconds <= 0:
        problem = f"{TIMEOUT_HEADER} is not a positive number of seconds"
        raise bad_request(TIMEOUT_HEADER, problem, "send a decimal number, such as 30 or 2.5")
    client = time.monotonic() + min(seconds, LONGEST_DEADLINE)
    return client if server is None else min(client, server)


def sampling_params(
    body: Sampling, preparer: Preparer, *, max_tokens: int | None, logprobs: int | None, prompt_logprobs: int | None
) -> SamplingParams:
    """The body's sampling parameters, else the model's defaults. The arguments are the fields that differ by body."""
    values: dict[str, Any] = {
        **body.sampling,
        "max_tokens": max_tokens,
        "logprobs": logprobs,
        "prompt_logprobs": prompt_logprobs,
        "detokenize": preparer.tokenizer is not None,
        "output_kind": RequestOutputKind.DELTA if body.stream else RequestOutputKind.FINAL_ONLY,
    }
    return preparer.params(values)


@dataclass(frozen=True, kw_only=True)
class Order:
    """The options that apply to all prompts of a body."""

    name: str  # the response's id, which /abort_requests takes
    deadline: float | None = None
    add_special_tokens: bool = True
    priority: int = 0
    tenant: str = ""
    cache_salt: str | None = None
    truncate: int | None = None  # truncate the prompt to this many tokens; negative: to as many as fit
    keep_right: bool = True  # truncation keeps the end of the prompt
    max_tokens_field: str = "max_tokens"  # the field's name in the body
    score_only: bool = False
    embed: bool = False
    pool: Pool = "last"
    beam_search: BeamSearchParams | None = None

    @property
    def generates(self) -> bool:
        return not (self.score_only or self.embed)


def order(request: web.Request, body: Ordered, *, kind: str, add_special_tokens: bool) -> Order:
    """`kind`: the prefix of the response's id. `add_special_tokens`: the default if the body does not set it."""
    if body.truncation_side is not None and body.truncate_prompt_tokens is None:
        problem = "truncation_side requires truncate_prompt_tokens"
        raise bad_request("truncation_side", problem, "set truncate_prompt_tokens, or remove truncation_side")
    if body.truncate_prompt_tokens == 0:
        problem = "truncate_prompt_tokens=0 leaves no prompt"
        raise bad_request("truncate_prompt_tokens", problem, "set it to 1 or more, or to -1 for all that fit")
    return Order(
        name=answer_id(kind, request, body),
        deadline=deadline(request),
        add_special_tokens=add_special_tokens if body.add_special_tokens is None else body.add_special_tokens,
        priority=body.priority or 0,
        tenant=request[RECORD].key or "",
        cache_salt=body.cache_salt,
        truncate=body.truncate_prompt_tokens,
        keep_right=body.truncation_side != "right",
    )


def prepare(
    preparer: Preparer,
    prompts: Sequence[str] | Sequence[list[int]],
    sampling: SamplingParams,
    order: Order,
    *,
    field: str,
    places: Sequence[tuple[str, int | None]] | None = None,
) -> list[Request]:
    """A checked request for each prompt. `field`: the name of the prompts' field in the body. `places`: each prompt's
    field, and place in it, if they are of several."""
    if not order.embed:
        _check_queue(len(prompts), preparer.limits, field)
    made: list[Request] = []
    for place, prompt in enumerate(prompts):
        try:
            made.append(_prepared(preparer, prompt, sampling, order))
        except RequestError as error:
            field, shown = (field, place if len(prompts) > 1 else None) if places is None else places[place]
            named = field if error.field == "prompt" else error.field
            problem, hint = error.problem, error.hint
            if order.embed:  # use the field's name in the body
                problem, hint = problem.replace("prompt", field), hint.replace("prompt", field)
            if shown is not None and named == field:
                problem = f"{field} {shown}: {problem}"
            raise type(error)(named, problem, hint) from None
    return made


def prepare_beams(
    preparer: Preparer,
    prompts: Sequence[str] | Sequence[list[int]],
    body: Sampling,
    order: Order,
    *,
    max_tokens: int,
    logprobs: int | None,
    field: str,
) -> list[Request]:
    """Like `prepare`, for a beam search of width n."""
    given = body.given(*(each.name for each in BEAM_FIELDS if each.sent))
    shown = body.given(*(each.name for each in FIELDS if each.acts is Acts.TEXT and each.sent and each.beams))
    try:
        search = BeamSearchParams(beam_width=1 if body.n is None else body.n, max_tokens=max_tokens, **given)
        sampling = beam_search.sampling_params(search, logprobs=logprobs, detokenize=preparer.tokenizer is not None)
        return prepare(preparer, prompts, replace(sampling, **shown), replace(order, beam_search=search), field=field)
    except RequestError as error:
        named = "n" if error.field == "beam_width" else error.field
        raise type(error)(named, error.problem.replace("beam_width", "n"), error.hint) from None


def _check_queue(count: int, limits: Limits, field: str) -> None:
    """Reject a body with more prompts than the server can ever hold, for which retrying would not help."""
    rows, queue = limits.max_num_seqs, limits.max_num_queued_reqs
    if queue is not None and count > rows + queue:
        problem = f"{field} has {count} prompts, but the server holds at most {rows + queue} requests: {rows} running"
        raise bad_request(field, f"{problem} and {queue} waiting (max_num_queued_reqs)", "send fewer per request")


def _prepared(preparer: Preparer, prompt: str | list[int], sampling: SamplingParams, order: Order) -> Request:
    if not prompt:  # checked before the tokenizer adds its special tokens
        raise RequestError("prompt", "the prompt is empty", "give at least one token")
    text = prompt if isinstance(prompt, str) else None
    ids = _encoded(preparer, prompt, sampling, order) if isinstance(prompt, str) else _as_array(prompt)
    longest = preparer.limits.max_model_len - order.generates
    if order.truncate is not None:
        keep = longest if order.truncate < 0 else order.truncate
        if len(ids) > keep:
            text = None  # the ids alone define the truncated prompt
            ids = ids[len(ids) - keep :] if order.keep_right else ids[:keep]
    check_length(len(ids), sampling, order, preparer.limits)
    given: Mapping[str, Any] = {"prompt_token_ids": ids, "prompt": text, "cache_salt": order.cache_salt}
    return preparer.prepare(
        given,
        sampling,
        request_id=f"{order.name}-{preparer.next_id()}",  # two clients may send the same id
        priority=order.priority,
        tenant=order.tenant,
        deadline=order.deadline,
        score_only=order.score_only,
        embed=order.embed,
        pool=order.pool,
        beam_search=order.beam_search,
    )


def _encoded(preparer: Preparer, text: str, sampling: SamplingParams, order: Order) -> np.ndarray:
    """The ids of a text. Its length is checked before the ids become Python objects, which blocks other threads."""
    encoded = preparer.encoded(text, add_special_tokens=order.add_special_tokens)
    count = len(encoded)
    if order.truncate is None:
        check_length(count, sampling, order, preparer.limits)
    elif count > MAX_TRUNCATED:
        problem = f"the prompt has {count} tokens, but at most {MAX_TRUNCATED} can be truncated"
        raise RequestError("prompt", problem, "shorten it")
    return np.array(encoded.ids, np.int32)


def _as_array(ids: list[int]) -> Sequence[int] | np.ndarray:
    """An array, which is cheap to check; the list if a number does not fit, for the check to name it."""
    try:
        return np.array(ids, np.int32)
    except OverflowError:
        return ids


def check_length(count: int, sampling: SamplingParams, order: Order, limits: Limits) -> None:
    """Check a prompt's length. The error has the words that clients search for when a conversation is too long."""
    longest = limits.max_model_len
    limit = f"this model's maximum context length is {longest} tokens"
    if count > longest - order.generates:
        leaves = ", which leaves no room for output" if count == longest else ""
        raise RequestError("prompt", f"{limit}, but the prompt has {count}{leaves}", "shorten the prompt")
    if order.generates and sampling.max_tokens is not None and sampling.max_tokens > longest:
        problem = f"{limit}, but {order.max_tokens_field} is {sampling.max_tokens}"
        raise RequestError(order.max_tokens_field, problem, f"lower it to {longest - count} or less for this prompt")
