# SPDX-License-Identifier: Apache-2.0
"""Runs the engine requests of one HTTP request: merges outputs, records metrics, and aborts when the client leaves.

Independent of protocols: the handlers decide what an output looks like to a client.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from functools import partial
from typing import Protocol

from aiohttp import web

from jaxserve.engine.capacity import Limits
from jaxserve.errors import EngineError, OverloadedError
from jaxserve.frontend.client import EngineClient
from jaxserve.frontend.streams import Stream
from jaxserve.server import estimate
from jaxserve.server.errors import ApiError, sentence
from jaxserve.server.http.rate_limit import Grant, Need
from jaxserve.server.observe.prometheus import Finished
from jaxserve.server.observe.request_record import RequestRecord
from jaxserve.server.state import GRANT, RECORD, SERVING, Serving, unavailable
from jaxserve.types.outputs import RequestOutput
from jaxserve.types.request import Request
from jaxserve.types.sampling_params import RequestOutputKind

AT_ONCE = 16  # requests of one body that are handled before other clients get their turn
LONGEST_LOGGED = 2**20  # the most characters of an answer that are kept for the log


class Shortcut(Protocol):
    """Passes outputs on in the callback that delivers them, without waking the task that waits for them: with hundreds
    of streams, waking a task for every token takes as long as everything else."""

    def ready(self) -> bool:
        """Whether an output could be passed on without waiting."""
        ...

    def take(self, place: int, output: RequestOutput) -> None:
        """Pass on an output that ends no sample."""
        ...


async def run(
    request: web.Request, prepared: Sequence[Request], *, shortcut: Shortcut | None = None
) -> AsyncGenerator[tuple[int, RequestOutput]]:
    """The outputs of these requests as they arrive, each with its request's position; except those that go through the
    shortcut.

    Use it with contextlib.aclosing: closing it aborts unfinished requests. Raises a 503 if the queue is full, and a 504
    if the deadline has passed.
    """
    serving, record = request.app[SERVING], request[RECORD]
    client = serving.check_ready()
    serving.check_in_time(client, prepared)
    grant = request[GRANT]
    with grant.reserving(need(prepared, client.preparer.limits)):
        record.prepared = [*record.prepared, *prepared]
        record.prompt_tokens += sum(len(each.prompt_token_ids) for each in prepared)
        async with aclosing(_run(serving, client, record, grant, prepared, shortcut)) as outputs:
            async for place, output in outputs:
                yield place, output


def need(prepared: Sequence[Request], limits: Limits) -> Need:
    """The tokens that these requests may use."""
    prompt = generated = unlimited = 0
    for each in prepared:
        length, most = len(each.prompt_token_ids), each.params.max_tokens
        prompt += length
        if each.generates and most is not None:
            generated += each.params.n * min(most, limits.max_model_len - length)
        elif each.generates:
            unlimited += each.params.n
    return Need(prompt=prompt, generated=generated, unlimited=unlimited)


async def _run(
    serving: Serving,
    client: EngineClient,
    record: RequestRecord,
    grant: Grant,
    prepared: Sequence[Request],
    shortcut: Shortcut | None,
) -> AsyncGenerator[tuple[int, RequestOutput]]:
    refused = False  # or lost with the engine
    tallies = [_Tally(serving, record, each) for each in prepared]
    merged = _Merged(tallies, shortcut)
    try:
        async with aclosing(merged.outputs(client, prepared)) as outputs:
            async for place, output in outputs:
                tallies[place].add(output, merged.streams[place])
                if output.finished:
                    tallies[place].end(merged.streams[place])
                yield place, output
    except OverloadedError as error:
        refused = True
        serving.metrics.rejections["queue_full"] += 1
        wait = serving.estimator.retry_after(serving.load(client))
        raise unavailable(sentence(error.problem, error.hint), wait=wait) from None
    except EngineError as error:
        refused = True
        raise serving.lost(error) from None
    finally:
        for stream, tally, each in zip(merged.streams, tallies, prepared, strict=False):
            client.close(stream)
            generated = tally.end(stream, refused=refused)
            if not refused:
                grant.use(len(each.prompt_token_ids), sum(generated))
            if each.generates and each.params.max_tokens is None and tally.ended:
                for tokens in generated:
                    grant.note_length(tokens)


class _Merged:
    """The outputs of several streams. What a slow client has not taken stays in the streams."""

    def __init__(self, tallies: Sequence["_Tally"], shortcut: Shortcut | None) -> None:
        self.streams: list[Stream] = []
        self._tallies, self._shortcut = tallies, shortcut
        self._arrived: dict[int, None] = {}  # the places of streams with news for the task
        self._held: dict[int, RequestOutput] = {}  # taken from their streams, but not by the shortcut
        self._news = asyncio.Event()
        self._waiting = False  # whether the task waits, having passed on everything before
        self._fault: Exception | None = None  # of the shortcut

    async def outputs(
        self, client: EngineClient, prepared: Sequence[Request]
    ) -> AsyncGenerator[tuple[int, RequestOutput]]:
        for place, request in enumerate(prepared):
            stream = client.open(request)
            stream.on_wake = partial(self._note, place)
            self.streams.append(stream)
            if place % AT_ONCE == AT_ONCE - 1:
                await asyncio.sleep(0)
        left = len(self.streams)
        while left:
            await self._wait()
            places = sorted(self._arrived)
            self._arrived.clear()
            for turn, place in enumerate(places):
                while (output := self._held.pop(place, None) or self.streams[place].take()) is not None:
                    left -= output.finished
                    yield place, output
                if turn % AT_ONCE == AT_ONCE - 1:
                    await asyncio.sleep(0)

    async def _wait(self) -> None:
        self._waiting = True
        try:
            await self._news.wait()
        finally:
            self._waiting = False
        self._news.clear()
        if self._fault is not None:
            raise self._fault

    def _note(self, place: int) -> None:
        if not self._waiting or place in self._arrived or not self._passed_on(place):
            self._arrived[place] = None
            self._news.set()

    def _passed_on(self, place: int) -> bool:
        """Whether the shortcut took what arrived, so that nothing is left for the task."""
        if self._shortcut is None or not self._shortcut.ready():
            return False
        stream = self.streams[place]
        try:
            output = stream.take()
            if output is None:
                return True
            if any(sample.finish_reason is not None for sample in output.outputs):
                self._held[place] = output
                return False
            self._tallies[place].add(output, stream)
            self._shortcut.take(place, output)
        except Exception as fault:
            self._fault = fault  # for the task to raise
            return False
        return True


class _Tally:
    """Counts and times of one request's output."""

    def __init__(self, serving: Serving, record: RequestRecord, request: Request) -> None:
        self._serving, self._record, self._request = serving, record, request
        self._seen = 0  # the number of gaps between tokens that were measured
        self._last: list[float | None] = [None] * request.params.n  # when each sample's last tokens arrived
        self.ended = False  # whether the engine has ended it
        self._closed = False

    def add(self, output: RequestOutput, stream: Stream) -> None:
        now = time.monotonic()
        came = stream.last_output or now  # not `now`: a slow client must not look like a slow engine
        adds = self._request.params.output_kind is RequestOutputKind.DELTA
        for sample in output.outputs:
            count, last = len(sample.token_ids), self._last[sample.index]
            if adds and count:
                if last is not None:
                    self._serving.metrics.token_gap((came - last) / count, count)
                    self._seen += count
                self._last[sample.index] = came
            if sample.finish_reason is not None:
                self._record.finish_reasons.append(sample.finish_reason)
            if self._serving.config.enable_log_outputs and self._record.text_length < LONGEST_LOGGED:
                self._record.texts.append(sample.text)
                self._record.text_length += len(sample.text)
        if self._late(now) and any(sample.finish_reason == "abort" for sample in output.outputs):
            seconds = (self._request.deadline or now) - self._record.arrival
            raise ApiError(504, f"The request exceeded its deadline of {estimate.shown(seconds)} seconds.")
        self.ended = output.finished

    def _late(self, now: float) -> bool:
        return self._request.deadline is not None and now >= self._request.deadline

    def end(self, stream: Stream, *, refused: bool = False) -> list[int]:
        """At its end, or when its stream is closed before. Returns how many tokens each sample has."""
        generated = stream.builder.generated
        if not self._closed:
            self._finish(stream, generated, refused=refused)
        return generated

    def _finish(self, stream: Stream, generated: list[int], *, refused: bool) -> None:
        self._closed = True
        record, metrics = self._record, self._serving.metrics
        record.generated_tokens += sum(generated)
        record.cached_tokens += stream.builder.cached
        if stream.scheduled is not None:
            record.scheduled = min(record.scheduled or stream.scheduled, stream.scheduled)
        if stream.first_output is not None and stream.last_output is not None:
            record.first_token = min(record.first_token or stream.first_output, stream.first_output)
            record.last_token = max(record.last_token or stream.last_output, stream.last_output)
        if not self.ended:
            if not refused:
                metrics.left(stream.arrival, first_token=stream.first_output)
            return
        if stream.scheduled is not None and stream.last_output is not None:
            self._serving.estimator.ended(stream.last_output - stream.scheduled)
        longest = max(generated)
        # For tokens that arrived together, or with the whole answer, use the mean gap.
        rest = sum(max(count - 1, 0) for count in generated) - self._seen
        if rest > 0 and stream.first_output is not None and stream.last_output is not None:
            metrics.token_gap((stream.last_output - stream.first_output) / (longest - 1), rest)
        metrics.request(
            Finished(
                arrival=stream.arrival,
                scheduled=stream.scheduled,
                first_token=stream.first_output,
                last_token=stream.last_output,
                end=stream.last_output or time.monotonic(),
                prompt_tokens=len(self._request.prompt_token_ids),
                cached_tokens=stream.builder.cached,
                generated_tokens=generated,
                max_tokens=self._request.params.max_tokens,
            )
        )
