# SPDX-License-Identifier: Apache-2.0
"""A second of what `python -m benchmarks.many_streams` does for a minute; and that it sees what it looks for."""

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from aiohttp import web
from aiohttp.test_utils import TestServer

from benchmarks import many_streams
from benchmarks.many_streams import LoadSeen
from tests.server import live as living


def test_streams_beside_a_canary(tmp_path: Path) -> None:
    model = living.write_model(tmp_path / "model")
    with living.live(model, engine={"max_num_queued_reqs": 64}) as server:
        seen = asyncio.run(many_streams.measure(f"http://127.0.0.1:{server.port}", streams=24, seconds=1))
        server.wait_idle()
    assert seen.good, many_streams.report(seen, streams=24, seconds=1)
    assert seen.answers >= 24 and seen.canaries >= 1 and len(seen.first) == seen.answers
    assert "canary identical: yes" in many_streams.report(seen, streams=24, seconds=1)


def _events(ids: list[int], *, text: str = "x", end: str = "data: [DONE]\n\n") -> bytes:
    chunks = [{"choices": [{"token_ids": [token], "text": text}]} for token in ids]
    return "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks).encode() + end.encode()


def seen_of(answers: Callable[[int, dict[str, Any]], web.Response], *, health: int = 200) -> LoadSeen:
    """What is seen of a server that answers so; the first argument counts requests."""

    async def run() -> LoadSeen:
        count = iter(range(10**6))

        async def complete(request: web.Request) -> web.Response:
            return answers(next(count), await request.json())

        async def probe(_: web.Request) -> web.Response:
            return web.Response(status=health)

        app = web.Application()
        app.router.add_post("/v1/completions", complete)
        app.router.add_get("/health", probe)
        async with TestServer(app) as server:
            return await many_streams.measure(str(server.make_url("")), streams=2, seconds=0.2)

    return asyncio.run(run())


def _right(body: dict[str, Any]) -> bytes:
    return _events(list(range(body["max_tokens"])))


def test_bad_answers_are_seen() -> None:
    def status(count: int, body: dict[str, Any]) -> web.Response:
        return web.Response(body=_right(body), status=200 if count == 0 else 503)

    def short(count: int, body: dict[str, Any]) -> web.Response:
        return web.Response(body=_right(body) if count == 0 else _events([1] * (body["max_tokens"] - 1)))

    def cut(count: int, body: dict[str, Any]) -> web.Response:
        return web.Response(body=_right(body) if count == 0 else _events(list(range(body["max_tokens"])), end=""))

    for kind, words in ((status, "status 503"), (short, "tokens instead of"), (cut, "without [DONE]")):
        seen = seen_of(kind)
        assert not seen.good and seen.answers == 0 and all(words in fault for fault in seen.faults)
        assert words in many_streams.report(seen, streams=2, seconds=0.2)
    assert any(
        "/health says 503" in fault
        for fault in seen_of(lambda _, body: web.Response(body=_right(body)), health=503).faults
    )


def test_another_text_of_the_canary_is_seen() -> None:
    seen = seen_of(lambda count, body: web.Response(body=_events([1] * body["max_tokens"], text=str(count))))
    assert seen.faults == [] and len(seen.canaries_differ) == seen.canaries > 0
    assert not seen.good and "canary identical: no" in many_streams.report(seen, streams=2, seconds=0.2)
