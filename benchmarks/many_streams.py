# SPDX-License-Identifier: Apache-2.0
"""Many concurrent streams for a minute: `python -m benchmarks.many_streams [--streams 1000] [--seconds 60]`.

`jaxserve run` serves the demo model. Clients keep this many streams open: whenever one ends, the next begins. Beside
them, a canary asks for the same greedy answer again and again, and GET /health is timed. Prints the numbers of answers
and of bad ones, whether all canaries gave the same token ids and the same text as one alone before the load, and the
longest time that /health took.

An answer is bad if its status is not 200, if it has not as many tokens as were asked for, or if it does not end with
[DONE]. Exits with status 1 if an answer is bad or a canary differs.
"""

import argparse
import asyncio
import json
import random
import statistics
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import aiohttp

from benchmarks import arguments, facts
from benchmarks.server import JaxserveServer
from jaxserve import demo

COMPLETIONS = "/v1/completions"
FIXED = {"ignore_eos": True, "stream": True, "return_token_ids": True}
CANARY: dict[str, Any] = {"prompt": "one two three", "max_tokens": 32, "temperature": 0, **FIXED}
LONGEST = 64  # tokens of a stream
PAUSE = 0.1  # seconds between two probes
SHOWN = 5  # faults of each kind


@dataclass
class LoadSeen:
    """What the clients saw. Seconds."""

    answers: int = 0
    tokens: int = 0
    faults: list[str] = field(default_factory=list[str])
    canaries: int = 0
    canaries_differ: list[str] = field(default_factory=list[str])
    health: list[float] = field(default_factory=list[float])
    first: list[float] = field(default_factory=list[float])  # until the first tokens of a stream

    @property
    def good(self) -> bool:
        return bool(self.answers and self.canaries) and not (self.faults or self.canaries_differ)


class BadAnswer(Exception):
    """What is wrong with an answer."""


async def answer(session: aiohttp.ClientSession, body: dict[str, Any]) -> tuple[list[int], str, float]:
    """The token ids and the text of a stream, and the seconds until the first."""
    ids: list[int] = []
    text, ended = "", False
    began, first = time.monotonic(), 0.0
    async with session.post(COMPLETIONS, json=body) as response:
        if response.status != 200:
            raise BadAnswer(f"status {response.status}: {(await response.text())[:200]}")
        async for line in response.content:
            if ended and line.strip():
                raise BadAnswer(f"after [DONE] came {line[:80]!r}")
            if line == b"data: [DONE]\n":
                ended = True
            elif line.startswith(b"data: "):
                first = first or time.monotonic() - began
                [choice] = json.loads(line[6:])["choices"]
                ids += choice["token_ids"]
                text += choice["text"]
    if not ended:
        raise BadAnswer("the stream ended without [DONE]")
    if len(ids) != body["max_tokens"]:
        raise BadAnswer(f"{len(ids)} tokens instead of {body['max_tokens']}")
    return ids, text, first


async def measure(url: str, *, streams: int, seconds: float, seed: int = 0) -> LoadSeen:
    """Load a ready server that has no other clients."""
    seen, rng = LoadSeen(), random.Random(seed)
    patient = aiohttp.ClientTimeout(total=None)
    everyone = aiohttp.TCPConnector(limit=0)
    async with (
        aiohttp.ClientSession(url, timeout=patient) as watch,
        aiohttp.ClientSession(url, timeout=patient, connector=everyone) as session,
    ):
        alone = (await answer(watch, CANARY))[:2]
        end = time.monotonic() + seconds

        async def one_stream() -> None:
            length, new = rng.randint(1, 32), rng.randint(1, LONGEST)
            body = {"prompt": [rng.randrange(20, 400) for _ in range(length)], "max_tokens": new, "temperature": 1}
            _, _, first = await answer(session, {**body, **FIXED})
            seen.answers += 1
            seen.tokens += new
            seen.first.append(first)

        async def one_canary() -> None:
            found = (await answer(watch, CANARY))[:2]
            seen.canaries += 1
            if found != alone:
                seen.canaries_differ.append(f"a canary answers {found}, alone {alone}")

        async def one_probe() -> None:
            began = time.monotonic()
            async with watch.get("/health") as response:
                if response.status != 200:
                    raise BadAnswer(f"/health says {response.status}")
            seen.health.append(time.monotonic() - began)
            await asyncio.sleep(PAUSE)

        async with asyncio.TaskGroup() as group:
            for _ in range(streams):
                group.create_task(_again(one_stream, seen, until=end))
            group.create_task(_again(one_canary, seen, until=end))
            group.create_task(_again(one_probe, seen, until=end))
    return seen


async def _again(work: Callable[[], Awaitable[None]], seen: LoadSeen, *, until: float) -> None:
    """Repeat, at least once."""
    while True:
        try:
            await work()
        except (BadAnswer, aiohttp.ClientError, ValueError, KeyError) as error:
            seen.faults.append(f"{type(error).__name__}: {error}")
            await asyncio.sleep(PAUSE)  # a server that refuses everything is not asked without end
        if time.monotonic() >= until:
            return


def report(seen: LoadSeen, *, streams: int, seconds: float) -> str:
    identical = "no" if seen.canaries_differ else "yes"
    lines = [
        f"{streams} streams for {seconds:g} s: {seen.answers} answers, {seen.tokens} tokens, {len(seen.faults)} bad",
        f"canary identical: {identical} ({seen.canaries} answers, {len(seen.canaries_differ)} differ)",
    ]
    if seen.first:
        lines.append(f"TTFT p50 {statistics.median(seen.first):.2f} s, max {max(seen.first):.2f} s")
    if seen.health:
        health = 1000 * statistics.median(seen.health), 1000 * max(seen.health)
        lines.append(f"/health p50 {health[0]:.0f} ms, max {health[1]:.0f} ms ({len(seen.health)} probes)")
    return "\n".join([*lines, *(f"wrong: {fault}" for fault in (seen.faults[:SHOWN] + seen.canaries_differ[:SHOWN]))])


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.many_streams", description="Check a server under many concurrent streams."
    )
    parser.add_argument("--streams", type=arguments.whole, default=1000, help="concurrent streams (default: 1000)")
    parser.add_argument("--seconds", type=arguments.positive, default=60, help="duration (default: 60)")
    parser.add_argument("--rows", type=arguments.whole, default=64, help="max_num_seqs of the server (default: 64)")
    parser.add_argument("--url", type=arguments.url, help="URL of a running server without other clients")
    parser.add_argument("--json", type=arguments.file_to_write, metavar="FILE", help="also write the result to FILE")
    options = parser.parse_args()
    streams, seconds = options.streams, options.seconds
    queue = {"max_num_seqs": options.rows, "max_num_queued_reqs": streams + 1}
    own = None if options.url else JaxserveServer({"model": str(demo.FOLDER), "max_model_len": 128, **queue})
    try:
        url = f"http://127.0.0.1:{own.port}" if own else options.url
        seen = asyncio.run(measure(url, streams=streams, seconds=seconds))
    finally:
        if own:
            own.close()
    print(facts.processor())
    print(report(seen, streams=streams, seconds=seconds))
    if options.json:
        content = facts.collect() | {"processor": facts.processor(), "streams": streams, "seconds": seconds}
        options.json.write_text(json.dumps(content | asdict(seen), indent=1) + "\n")
    sys.exit(not seen.good)


if __name__ == "__main__":
    main()
