# SPDX-License-Identifier: Apache-2.0
"""Runs prompts for their hidden states, and formats vectors and usage: for embeddings, classes and scores."""

import base64
from collections.abc import Sequence
from contextlib import aclosing
from typing import Any, Literal

import numpy as np
from aiohttp import web

from jaxserve.frontend.prepare import Preparer
from jaxserve.server import params, requests
from jaxserve.server.answers.replies import check_sound
from jaxserve.server.errors import ApiError
from jaxserve.server.params import Order
from jaxserve.server.state import GRANT, SERVING
from jaxserve.types.outputs import RequestOutput
from jaxserve.types.request import Request
from jaxserve.types.sampling_params import SamplingParams

type Form = Literal["float", "base64"] | None


def prepared(
    preparer: Preparer,
    prompts: Sequence[str] | Sequence[list[int]],
    order: Order,
    *,
    field: str,
    places: Sequence[tuple[str, int | None]] | None = None,
) -> list[Request]:
    """A request for each prompt; `order` embeds."""
    sampling = SamplingParams(max_tokens=1, detokenize=False)
    return params.prepare(preparer, prompts, sampling, order, field=field, places=places)


async def run(request: web.Request, asked: list[Request]) -> list[RequestOutput]:
    """The outputs, which have hidden states, in the order of the requests."""
    client = request.app[SERVING].check_ready()
    last: dict[int, RequestOutput] = {}
    at_once = client.preparer.limits.max_num_queued_reqs or len(asked)  # never more than the queue holds
    with request[GRANT].reserving(requests.need(asked, client.preparer.limits)):
        for begin in range(0, len(asked), at_once):
            async with aclosing(requests.run(request, asked[begin : begin + at_once])) as outputs:
                async for place, output in outputs:
                    check_sound(output)
                    last[begin + place] = output
    return [last[place] for place in range(len(asked))]


def hidden_of(output: RequestOutput) -> np.ndarray:
    if output.embedding is None:
        raise ApiError(503, "The request was aborted.", headers={"Retry-After": "1"})
    return output.embedding


def shown(vector: np.ndarray, form: Form) -> Any:
    """The vector as JSON has it."""
    return base64.b64encode(vector.astype("<f4").tobytes()).decode() if form == "base64" else vector.tolist()


def usage(outputs: Sequence[RequestOutput]) -> dict[str, Any]:
    tokens = sum(len(output.prompt_token_ids) for output in outputs)
    cached = sum(output.num_cached_tokens for output in outputs)
    return {"prompt_tokens": tokens, "total_tokens": tokens, "prompt_tokens_details": {"cached_tokens": cached}}
