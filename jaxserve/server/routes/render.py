# SPDX-License-Identifier: Apache-2.0
"""POST /v1/chat/completions/render and /v1/completions/render: the token ids and sampling parameters of a request.

They generate nothing. Routers use them to compute the hashes of cached prefixes.
"""

from typing import Any

from aiohttp import web

from jaxserve.server import params
from jaxserve.server.answers.replies import json_response
from jaxserve.server.errors import bad_request
from jaxserve.server.params import Order
from jaxserve.server.protocol.chat import ChatRequest
from jaxserve.server.protocol.completion import CompletionRequest
from jaxserve.server.protocol.sampling import SENT, Sampling
from jaxserve.server.routes import chat, completions
from jaxserve.server.routes.table import Route
from jaxserve.server.state import RECORD, SERVING
from jaxserve.types.request import Request

ALSO = ("max_tokens", "logprobs", "prompt_logprobs")  # parameters whose fields differ by body


async def render_chat(request: web.Request) -> web.Response:
    serving = request.app[SERVING]
    preparer = serving.check_ready().preparer
    body = _checked(await params.read(request, ChatRequest))
    order = params.order(request, body, kind="chatcmpl", add_special_tokens=False)
    size = request[RECORD].body_size
    [prepared] = await serving.workers.run(size, chat.prepared_chat, serving, preparer, body, order)
    return json_response(_shown(prepared, body, order, longest=preparer.limits.max_model_len))


async def render_completion(request: web.Request) -> web.Response:
    serving = request.app[SERVING]
    preparer = serving.check_ready().preparer
    body = _checked(await params.read(request, CompletionRequest))
    order = params.order(request, body, kind="cmpl", add_special_tokens=True)
    prepared = await serving.workers.run(
        request[RECORD].body_size, completions.prepared_completions, preparer, body, order
    )
    longest = preparer.limits.max_model_len
    return json_response([_shown(each, body, order, longest=longest) for each in prepared])


def _checked[B: Sampling](body: B) -> B:
    if body.use_beam_search:
        raise bad_request("use_beam_search", "a beam search cannot be rendered", "remove use_beam_search")
    return body


def _shown(prepared: Request, body: Sampling, order: Order, *, longest: int) -> dict[str, Any]:
    """In the shape of vLLM's requests for /inference/v1/generate."""
    ids = prepared.prompt_ids
    values: dict[str, Any] = {name: getattr(prepared.params, name) for name in (*SENT, *ALSO)}
    if values["max_tokens"] is None:
        values["max_tokens"] = longest - len(ids)
    options = body.stream_options
    return {
        "request_id": order.name,
        "token_ids": ids,
        "features": None,
        "sampling_params": values,
        "model": body.model,
        "stream": bool(body.stream),
        "stream_options": None if options is None else options.model_dump(exclude_unset=True),
        "cache_salt": prepared.cache_salt,
        "priority": prepared.priority,
        "token_offsets": None,
    }


ROUTES = (
    Route(
        "POST",
        "/v1/chat/completions/render",
        render_chat,
        body=ChatRequest,
        summary="Token ids and parameters of a chat, as vLLM renders it.",
    ),
    Route(
        "POST",
        "/v1/completions/render",
        render_completion,
        body=CompletionRequest,
        summary="Token ids and parameters of a completion, one entry per prompt.",
    ),
)
