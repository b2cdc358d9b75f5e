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
    chunks = _Chunks(answer, events, to_client)
    try:
        await chunks.run()
        to_client.hold((answer.chunks.usage(chunks.usage) if answer.include_usage else b"") + DONE)
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


class _Chunks:
    """Writes the chunks of a streamed answer. A shortcut of its requests, if no chunk takes long to make."""

    def __init__(self, answer: Answer[Any], events: Chunker, to_client: EventStream) -> None:
        self._answer, self._events, self._to_client = answer, events, to_client
        self.usage = Usage(prompt=sum(len(each.prompt_token_ids) for each in answer.prepared))
        self._cached = [0] * len(answer.prepared)
        self._left = len(answer.prepared)
        self._pace, self._large = Pace(answer.body.stream_interval or 1), _Large(answer.prepared)

    async def run(self) -> None:
        answer = self._answer
        params = [each.params for each in answer.prepared]
        quick = (answer.body.stream_interval or 1) == 1 and all(
            each.logprobs is None and each.prompt_logprobs is None for each in params
        )
        running = requests.run(answer.request, answer.prepared, shortcut=self if quick else None)
        async with aclosing(running) as outputs:
            async for place, output in outputs:
                await self._send(place, output)

    async def _send(self, place: int, output: RequestOutput) -> None:
        check_sound(output)
        self._count(place, output)
        self._left -= output.finished
        due = self._pace.due(place, output)
        if due is None:
            return
        if self._large.takes_long(place, due):
            events = await self._answer.serving.workers.run(0, self._events, place, due, self.usage)
        else:
            events = self._events(place, due, self.usage)
        if self._left:
            await self._to_client.send(events)
        else:
            self._to_client.hold(events)  # the end follows at once

    def _count(self, place: int, output: RequestOutput) -> None:
        for sample in output.outputs:
            self.usage.completion += len(sample.token_ids)
        if output.num_cached_tokens != self._cached[place]:
            self.usage.cached += output.num_cached_tokens - self._cached[place]
            self._cached[place] = output.num_cached_tokens

    # --- as a shortcut ----------------------------------------------------------------------------------------------

    def ready(self) -> bool:
        return self._to_client.ready

    def take(self, place: int, output: RequestOutput) -> None:
        self._count(place, output)
        self._to_client.write(self._events(place, output, self.usage))


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
