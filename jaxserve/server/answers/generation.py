# SPDX-License-Identifier: Apache-2.0
"""Shared by completions and chats: turns requests into an answer, whole or streamed. Each defines its own shapes."""

import logging
from collections.abc import Callable, Sequence
from contextlib import aclosing
from typing import Any

from aiohttp import web

from jaxserve.errors import EngineError
from jaxserve.server import params, requests
from jaxserve.server.answers.logprobs import TokenNames
from jaxserve.server.answers.replies import Chunks, Envelope, Usage, check_sound, json_response
from jaxserve.server.answers.sse import DONE, EventStream
from jaxserve.server.answers.stream_interval import Pace
from jaxserve.server.errors import ApiError, as_api_error
from jaxserve.server.protocol.sampling import Sampling
from jaxserve.server.state import RECORD, SERVING
from jaxserve.types.outputs import RequestOutput
from jaxserve.types.request import Request

LOG = logging.getLogger("jaxserve.server")
# An answer with more log probabilities than this is built in a thread: it takes more than a few milliseconds.
MANY = 2000

type Chunker = Callable[[int, RequestOutput, Usage], bytes]
"""Makes the events of one output, from the request's position, the output and the usage so far."""


class Answer[B: Sampling]:
    """One HTTP request to answer, with its body and its engine requests."""

    def __init__(self, request: web.Request, body: B, prepared: Sequence[Request], *, id: str, object: str) -> None:
        serving = request.app[SERVING]
        self.request, self.body, self.prepared, self.serving = request, body, prepared, serving
        as_ids = serving.config.return_tokens_as_token_ids
        if body.return_tokens_as_token_ids is not None:
            as_ids = body.return_tokens_as_token_ids
        self.names = TokenNames(serving.tokenizer, as_ids=as_ids)
        self.envelope = Envelope.new(id, object, params.model_name(serving, body))
        options, forced = body.stream_options, serving.config.enable_force_include_usage
        self.include_usage = forced or bool(options and options.include_usage)
        self.continuous_usage = self.include_usage and bool(options and options.continuous_usage_stats)
        self.chunks = Chunks(self.envelope, continuous_usage=self.continuous_usage)


async def whole(answer: Answer[Any], reply: Callable[[list[RequestOutput]], dict[str, Any]]) -> web.Response:
    last: dict[int, RequestOutput] = {}
    async with aclosing(requests.run(answer.request, answer.prepared)) as outputs:
        async for place, output in outputs:
            check_sound(output)
            last[place] = output
    ordered = [last[place] for place in range(len(answer.prepared))]
    choices = sum(len(output.outputs) for output in ordered)
    if _logprobs(ordered) + 8 * choices <= MANY:  # a choice takes as long as eight of them
        return json_response(reply(ordered))
    return await answer.serving.workers.run(0, lambda: json_response(reply(ordered)))


def _logprobs(outputs: list[RequestOutput]) -> int:
    tokens = sum(len(output.prompt_logprobs or ()) for output in outputs)
    return tokens + sum(len(sample.logprobs or ()) for output in outputs for sample in output.outputs)


async def stream(answer: Answer[Any], events: Chunker) -> web.StreamResponse:
    """Stream an answer. Headers are sent with the first output or comment: an error before that is a status, later an
    event."""
    to_client = EventStream(answer.request, keep_alive=answer.serving.config.sse_keep_alive)
    try:
        usage = await _chunks(answer, events, to_client)
        await to_client.send((answer.chunks.usage(usage) if answer.include_usage else b"") + DONE)
    except ConnectionError:  # the client has left
        raise
    except Exception as error:
        if not to_client.started:
            raise
        shown = as_api_error(error)
        if not isinstance(error, ApiError | EngineError):  # an engine's failure is logged once, in lifecycle.py
            LOG.error("an answer failed after it had started", exc_info=error)
        answer.request[RECORD].error = shown.message
        await to_client.fail(shown)
    finally:
        to_client.stop()
    return await to_client.close()


async def _chunks(answer: Answer[Any], events: Chunker, to_client: EventStream) -> Usage:
    usage = Usage(prompt=sum(len(each.prompt_token_ids) for each in answer.prepared))
    cached = [0] * len(answer.prepared)
    pace, large = Pace(answer.body.stream_interval or 1), _Large(answer.prepared)
    async with aclosing(requests.run(answer.request, answer.prepared)) as outputs:
        async for place, output in outputs:
            check_sound(output)
            usage.completion += sum(len(sample.token_ids) for sample in output.outputs)
            cached[place] = output.num_cached_tokens
            usage.cached = sum(cached)
            due = pace.due(place, output)
            if due is None:
                continue
            if large.takes_long(place, due):
                await to_client.send(await answer.serving.workers.run(0, events, place, due, usage))
            else:
                await to_client.send(events(place, due, usage))
    return usage


class _Large:
    """Decides which of a stream's outputs are built in a thread."""

    def __init__(self, prepared: Sequence[Request]) -> None:
        self._prepared = prepared
        self._begun: set[tuple[int, int]] = set()

    def takes_long(self, place: int, output: RequestOutput) -> bool:
        """Whether the output has more than MANY log probabilities. A sample's first tokens also bring the prompt's."""
        request = self._prepared[place]
        first = {(place, sample.index) for sample in output.outputs} - self._begun
        self._begun |= first
        echoed = 0 if request.params.prompt_logprobs is None else len(request.prompt_token_ids) * len(first)
        return echoed + _logprobs([output]) > MANY
