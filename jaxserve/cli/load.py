# SPDX-License-Identifier: Apache-2.0
"""Load generator: sends requests to an OpenAI-compatible server and records when tokens arrive. Independent of flags.

    jobs --- at a rate, with limited concurrency ---> streamed requests ---> one Sample each ---> summary

Events are timestamped when they are read, and inspected as bytes: with hundreds of streams, JSON parsing would dominate
the measured time.
"""

import asyncio
import json
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from jaxserve.errors import one_line

NEVER = 24 * 3600.0


@dataclass(frozen=True, slots=True)
class Job:
    """A request: path and body."""

    path: str
    body: dict[str, Any]
    prompt_tokens: int  # used if the server does not report it


@dataclass(slots=True)
class Sample:
    """The result of one job. Times are those of time.perf_counter, in seconds."""

    began: float = 0.0
    stamps: list[float] = field(default_factory=list[float])  # of each event with text
    prompt_tokens: int = 0
    output_tokens: int = 0
    error: str | None = None

    @property
    def ttft(self) -> float:
        return self.stamps[0] - self.began

    @property
    def latency(self) -> float:
        return self.stamps[-1] - self.began

    @property
    def tpot(self) -> float:
        """Seconds per token after the first."""
        return (self.stamps[-1] - self.stamps[0]) / (self.output_tokens - 1)

    @property
    def gaps(self) -> list[float]:
        return [late - early for early, late in zip(self.stamps, self.stamps[1:], strict=False)]


@dataclass(frozen=True, slots=True)
class Outcome:
    samples: list[Sample]
    seconds: float
    most_at_once: int


async def run(
    root: str,
    jobs: Sequence[Job],
    *,
    concurrency: int | None = None,
    rate: float = float("inf"),
    burstiness: float = 1.0,
    seed: int = 0,
    api_key: str | None = None,
    socket: str | None = None,
    timeout: float = NEVER,
    keep_alive: bool = True,
    done: Callable[[Sample], None] | None = None,
) -> Outcome:
    """Send all jobs, `rate` per second at random times (all at once if infinite), at most `concurrency` at a time. The
    time between two jobs has a gamma distribution of shape `burstiness`: 1 makes a Poisson process, less makes bursts.
    `socket`: the path of the server's Unix socket.
    Without `keep_alive` each job opens a new connection: some servers close theirs without notice after a stream."""
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    slots = asyncio.Semaphore(concurrency or len(jobs) or 1)
    draw, going, most = random.Random(seed), 0, 0
    kept: dict[str, Any] = {"keepalive_timeout": 60} if keep_alive else {"force_close": True}
    connector = (
        aiohttp.TCPConnector(limit=0, **kept) if socket is None else aiohttp.UnixConnector(socket, limit=0, **kept)
    )
    limits = aiohttp.ClientTimeout(total=timeout)
    async with aiohttp.ClientSession(connector=connector, headers=headers, timeout=limits) as session:

        async def one(job: Job) -> Sample:
            nonlocal going, most
            async with slots:
                going += 1
                most = max(most, going)
                try:
                    sample = await _send(session, root, job)
                finally:
                    going -= 1
            if done is not None:
                done(sample)
            return sample

        began = time.perf_counter()
        due = began
        async with asyncio.TaskGroup() as group:
            tasks: list[asyncio.Task[Sample]] = []
            for job in jobs:
                tasks.append(group.create_task(one(job)))
                if rate != float("inf"):
                    due += pause(draw, rate, burstiness)
                    await asyncio.sleep(max(due - time.perf_counter(), 0))
        return Outcome([task.result() for task in tasks], time.perf_counter() - began, most)


def pause(draw: random.Random, rate: float, burstiness: float) -> float:
    """Seconds until the next job, 1 / `rate` on average."""
    if burstiness == 1:
        return draw.expovariate(rate)
    return draw.gammavariate(burstiness, 1 / (rate * burstiness))


async def _send(session: aiohttp.ClientSession, root: str, job: Job) -> Sample:
    sample = Sample(prompt_tokens=job.prompt_tokens)
    body = {**job.body, "stream": True, "stream_options": {"include_usage": True}}
    sample.began = time.perf_counter()
    try:
        async with session.post(root + job.path, json=body) as response:
            if response.status != 200:
                said = await response.text(errors="replace")
                sample.error = one_line(f"{response.status} {_message(said)}")
            else:
                await _read(response, sample)
    except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
        sample.error = one_line(str(error) or type(error).__name__)
    if sample.error is None and not sample.stamps:
        sample.error = "the response has no text: set --ignore-eos to make all answers equally long"
    if sample.error is None and not sample.output_tokens:
        sample.output_tokens = len(sample.stamps)
    return sample


async def _read(response: aiohttp.ClientResponse, sample: Sample) -> None:
    """Timestamps the events of a stream."""
    rest, ended = b"", False
    async for chunk in response.content.iter_any():
        now = time.perf_counter()
        *events, rest = (rest + chunk).split(b"\n\n")
        for event in events:
            data = event.removeprefix(b"data:").strip()
            if data == b"[DONE]":
                ended = True
            elif data.startswith(b"{"):
                ended |= _event(data.replace(b'": ', b'":'), now, sample)
    if not ended and sample.error is None:
        sample.error = "the response ended early"


def _event(data: bytes, now: float, sample: Sample) -> bool:
    """Whether this event completes the response: not every server sends [DONE]."""
    # Quotes inside a string are escaped, so these matches are keys, never generated text.
    if data.startswith(b'{"error"'):
        sample.error = one_line(_message(data.decode(errors="replace")))
        return False
    if b'"usage":{' in data:
        usage = json.loads(data)["usage"]
        sample.prompt_tokens, sample.output_tokens = usage["prompt_tokens"], usage["completion_tokens"]
    # The first event of a chat has the role, the last one the finish reason; both may have no text.
    if any(key + b'"' in data and key + b'""' not in data for key in (b'"content":', b'"text":')):
        sample.stamps.append(now)
    return b'"finish_reason":"' in data


def _message(said: str) -> str:
    try:
        error: Any = json.loads(said)["error"]
        return error if isinstance(error, str) else str(error["message"])
    except (ValueError, KeyError, TypeError):
        return said[:200]


# --- figures --------------------------------------------------------------------------------------------------------


def summary(outcome: Outcome, limits: Mapping[str, float] | None = None) -> dict[str, float]:
    """The results that vLLM's benchmark reports, under its names. Failed requests only count as failed. `limits`:
    seconds that a request must keep to count for the goodput, by name of the time: ttft, tpot, e2el."""
    good = [sample for sample in outcome.samples if sample.error is None and sample.stamps]
    read, written = sum(s.prompt_tokens for s in good), sum(s.output_tokens for s in good)
    seconds = max(outcome.seconds, 1e-9)
    found: dict[str, float] = {
        "duration": outcome.seconds,
        "completed": len(good),
        "failed": len(outcome.samples) - len(good),
        "total_input_tokens": read,
        "total_output_tokens": written,
        "request_throughput": len(good) / seconds,
        "output_throughput": written / seconds,
        "total_token_throughput": (read + written) / seconds,
        "max_concurrent_requests": outcome.most_at_once,
    }
    if limits:
        found["request_goodput"] = sum(_keeps(sample, limits) for sample in good) / seconds
    found |= spread("ttft", [sample.ttft for sample in good])
    found |= spread("tpot", [sample.tpot for sample in good if sample.output_tokens > 1])
    found |= spread("itl", [gap for sample in good for gap in sample.gaps])
    return found | spread("e2el", [sample.latency for sample in good])


def _keeps(sample: Sample, limits: Mapping[str, float]) -> bool:
    times = {"ttft": sample.ttft, "e2el": sample.latency, "tpot": sample.tpot if sample.output_tokens > 1 else 0.0}
    return all(times[name] <= limit for name, limit in limits.items())


def spread(name: str, seconds: Sequence[float]) -> dict[str, float]:
    """Mean, median, standard deviation and percentiles in milliseconds; zeros if there are no measurements."""
    values = sorted(second * 1000 for second in seconds)
    found = {
        f"mean_{name}_ms": statistics.fmean(values) if values else 0.0,
        f"median_{name}_ms": percentile(values, 50),
        f"std_{name}_ms": statistics.pstdev(values) if values else 0.0,
    }
    return found | {f"p{share}_{name}_ms": percentile(values, share) for share in (90, 99)}


def percentile(values: Sequence[float], share: float) -> float:
    """The percentile of sorted values, interpolated linearly."""
    if not values:
        return 0.0
    place = (len(values) - 1) * share / 100
    low = int(place)
    high = min(low + 1, len(values) - 1)
    return values[low] + (values[high] - values[low]) * (place - low)
