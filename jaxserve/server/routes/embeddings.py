# SPDX-License-Identifier: Apache-2.0
"""POST /v1/embeddings: the final hidden state of each input's last token, normalized to unit length."""

import base64
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import numpy as np
from aiohttp import web

from jaxserve.frontend.prepare import Preparer
from jaxserve.server import params, requests
from jaxserve.server.answers.replies import check_sound, json_response
from jaxserve.server.errors import ApiError, bad_request
from jaxserve.server.params import Order
from jaxserve.server.protocol.completion import as_list
from jaxserve.server.protocol.embeddings import EmbeddingRequest
from jaxserve.server.routes.table import Route
from jaxserve.server.state import RECORD, SERVING
from jaxserve.types.outputs import RequestOutput
from jaxserve.types.request import Request
from jaxserve.types.sampling_params import SamplingParams


async def create(request: web.Request) -> web.Response:
    serving = request.app[SERVING]
    preparer = serving.check_ready().preparer
    body = await params.read(request, EmbeddingRequest)
    order = params.order(request, body, kind="embd", add_special_tokens=True)
    prepared = await serving.workers.run(
        request[RECORD].body_size, _prepared, preparer, body, replace(order, embed=True)
    )
    last: dict[int, RequestOutput] = {}
    at_once = preparer.limits.max_num_queued_reqs or len(prepared)  # never more than the queue holds
    for begin in range(0, len(prepared), at_once):
        async with aclosing(requests.run(request, prepared[begin : begin + at_once])) as outputs:
            async for place, output in outputs:
                check_sound(output)
                last[begin + place] = output
    name = params.model_name(serving, body)
    outputs = [last[place] for place in range(len(prepared))]
    return await serving.workers.run(request[RECORD].body_size, _reply, body, outputs, id=order.name, model=name)


def _prepared(preparer: Preparer, body: EmbeddingRequest, order: Order) -> list[Request]:
    prompts = as_list(body.input)
    if not prompts:
        raise bad_request("input", "input is an empty list", "send at least one item")
    sampling = SamplingParams(max_tokens=1, detokenize=False)
    return params.prepare(preparer, prompts, sampling, order, field="input")


def _reply(body: EmbeddingRequest, outputs: list[RequestOutput], *, id: str, model: str) -> web.Response:
    data: list[dict[str, Any]] = []
    for index, output in enumerate(outputs):
        if output.embedding is None:
            raise ApiError(503, "The request was aborted.", headers={"Retry-After": "1"})
        size = output.embedding.shape[0]
        if body.dimensions not in (None, size):
            problem = f"dimensions is {body.dimensions}, but this model's embeddings have {size}"
            raise bad_request("dimensions", problem, "remove it, because embeddings cannot be shortened")
        vector = normalized(output.embedding)
        if body.encoding_format == "base64":
            shape: Any = base64.b64encode(vector.astype("<f4").tobytes()).decode()
        else:
            shape = vector.tolist()
        data.append({"object": "embedding", "index": index, "embedding": shape})
    tokens = sum(len(output.prompt_token_ids) for output in outputs)
    cached = sum(output.num_cached_tokens for output in outputs)
    usage = {"prompt_tokens": tokens, "total_tokens": tokens, "prompt_tokens_details": {"cached_tokens": cached}}
    return json_response({"id": id, "model": model, "object": "list", "data": data, "usage": usage})


def normalized(vector: np.ndarray) -> np.ndarray:
    """The vector scaled to unit length, in float32."""
    length = np.sqrt(np.sum(np.square(vector.astype(np.float64))))
    return (vector / max(float(length), 1e-12)).astype(np.float32)


ROUTES = (Route("POST", "/v1/embeddings", create, body=EmbeddingRequest, summary="Create embeddings."),)
