# SPDX-License-Identifier: Apache-2.0
"""One HTTP request at the engine: its jobs' outputs as one, its times, and what becomes of it when it is left.

Knows nothing of protocols: what an output looks like to a client is the handlers'.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, Protocol

from jaxserve.errors import EngineError, OverloadedError
from jaxserve.server.config import ServerConfig
from jaxserve.server.errors import ApiError, sentence
from jaxserve.server.observe.prometheus import Finished, Metrics
from jaxserve.server.observe.request_record import Record
from jaxserve.types.outputs import RequestOutput
from jaxserve.types.sampling_params import RequestOutputKind

if TYPE_CHECKING:
    from jaxserve.frontend.client import Front
    from jaxserve.frontend.prepare import Ready
    from jaxserve.frontend.streams import Stream


LONGEST_LOGGED = 2**20  # characters that are kept of an answer for the log


class Server(Protocol):
    """What it needs of who serves."""

    config: ServerConfig
    metrics: Metrics

    def check_ready(self) -> "Front": ...
    def note_end(self) -> None: ...
    def lost(self, error: EngineError) -> Exception: ...
    def retry_after(self) -> int: ...


async def run(serving: Server, record: Record, jobs: "Sequence[Ready]") -> AsyncGenerator[tuple[int, RequestOutput]]:
    front = serving.check_ready()
    record.jobs = [*record.jobs, *jobs]
    record.prompt_tokens += sum(len(job.request.prompt_token_ids) for job in jobs)
    streams: list[Stream] = []
    tallies = [_Tally(serving, record, job) for job in jobs]
    try:
        merged = _single(front, streams, jobs[0]) if len(jobs) == 1 else _merged(front, streams, jobs)
        async with aclosing(merged) as outputs:
            async for place, output in outputs:
                tallies[place].add(output, streams[place])
                yield place, output
    except OverloadedError as error:
        serving.metrics.rejections["queue_full"] += 1
        headers = {"Retry-After": str(serving.retry_after())}
        raise ApiError(503, sentence(error.problem, error.hint), headers=headers) from None
    except EngineError as error:
        raise serving.lost(error) from None
    finally:
        for stream, tally in zip(streams, tallies, strict=False):
            front.close(stream)
            tally.end(stream)


async def _single(front: "Front", streams: "list[Stream]", job: "Ready") -> AsyncGenerator[tuple[int, RequestOutput]]:
    stream = front.open(job)
    streams.append(stream)
    while not stream.finished:
        yield 0, await stream.next()


async def _merged(
    front: "Front", streams: "list[Stream]", jobs: "Sequence[Ready]"
) -> AsyncGenerator[tuple[int, RequestOutput]]:
    """At most one output of each waits here: what a slow client does not take stays in the streams."""
    for job in jobs:
        streams.append(front.open(job))
    pending = {asyncio.ensure_future(stream.next()): place for place, stream in enumerate(streams)}
    try:
        while pending:
            done, _ = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for task in sorted(done, key=pending.__getitem__):
                output = task.result()
                place = pending.pop(task)
                yield place, output
                if not streams[place].finished:
                    pending[asyncio.ensure_future(streams[place].next())] = place
    finally:
        for task in pending:
            if task.done() and not task.cancelled():
                task.exception()  # seen: several end with the engine, and one is told
            task.cancel()


class _Tally:
    """What one job has given so far."""

    def __init__(self, serving: Server, record: Record, job: "Ready") -> None:
        self._serving, self._record, self._request = serving, record, job.request
        self._generated = [0] * job.request.params.n
        self._cached = 0
        self._seen = 0  # gaps between tokens that were measured
        self._last: list[float | None] = [None] * job.request.params.n  # when each sample's last tokens came
        # What was generated is told with the outputs: of an answer that was to come whole and did not, nobody knows.
        self._counted = job.request.params.output_kind is RequestOutputKind.DELTA
        self._ended = False

    def add(self, output: RequestOutput, stream: "Stream") -> None:
        now = time.monotonic()
        came = stream.last_output or now  # a client that reads slowly is taken for no slow engine
        adds = self._request.params.output_kind is RequestOutputKind.DELTA
        for sample in output.outputs:
            count, last = len(sample.token_ids), self._last[sample.index]
            if adds and count:
                if last is not None:
                    self._serving.metrics.token_gap((came - last) / count, count)
                    self._seen += count
                self._last[sample.index] = came
            self._generated[sample.index] = count + (self._generated[sample.index] if adds else 0)
            if sample.finish_reason is not None:
                self._record.finish_reasons.append(sample.finish_reason)
            if self._serving.config.enable_log_outputs and self._record.text_length < LONGEST_LOGGED:
                self._record.texts.append(sample.text)
                self._record.text_length += len(sample.text)
        self._cached = output.num_cached_tokens
        self._counted = True
        if self._late(now) and any(sample.finish_reason == "abort" for sample in output.outputs):
            seconds = (self._request.deadline or now) - self._record.arrival
            raise ApiError(504, f"The request took longer than its deadline of {seconds:.3g} seconds.")
        self._ended = output.finished

    def _late(self, now: float) -> bool:
        return self._request.deadline is not None and now >= self._request.deadline

    def end(self, stream: "Stream") -> None:
        """The stream is closed, at its end or before it."""
        record, metrics = self._record, self._serving.metrics
        record.generated_tokens += sum(self._generated)
        record.all_counted &= self._counted
        record.cached_tokens += self._cached
        if stream.first_output is not None and stream.last_output is not None:
            record.first_token = min(record.first_token or stream.first_output, stream.first_output)
            record.last_token = max(record.last_token or stream.last_output, stream.last_output)
        if not self._ended:
            return
        self._serving.note_end()
        longest = max(self._generated)
        # Tokens that came together, or with the whole answer: their mean.
        rest = sum(max(count - 1, 0) for count in self._generated) - self._seen
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
                cached_tokens=self._cached,
                generated_tokens=self._generated,
                max_tokens=self._request.params.max_tokens,
            )
        )
