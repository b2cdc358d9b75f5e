# SPDX-License-Identifier: Apache-2.0
"""A fake server: the real page, and an API whose answers and timing the test controls."""

import asyncio
import json
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from jaxserve.server.routes import playground

# A piece of an answer: its text; bytes as they are to be sent; an event to wait for; or an error to send.
type Piece = str | bytes | asyncio.Event | dict[str, Any]

METRICS = """\
# HELP jaxserve:num_requests_running Requests that have a row.
# TYPE jaxserve:num_requests_running gauge
jaxserve:num_requests_running{engine="0",model_name="a} b"} 3.0
jaxserve:num_requests_waiting{engine="0",model_name="a} b"} 2.0
jaxserve:num_requests_waiting_by_reason{engine="0",model_name="a} b",reason="capacity"} 99.0
jaxserve:kv_blocks{engine="0",model_name="a} b",state="free"} 700.0
jaxserve:kv_blocks{engine="0",model_name="a} b",state="cached"} 200.0
jaxserve:kv_blocks{engine="0",model_name="a} b",state="used"} 100.0
jaxserve:prefix_cache_queries_total{engine="0"} 400.0
jaxserve:prefix_cache_hits_total{engine="0"} 300.0
jaxserve:generation_tokens_total{engine="0"} %(tokens)d
"""


def unwell(status: str, detail: str, **more: int) -> web.Response:
    return web.json_response({"status": status, "detail": detail, **more}, status=503, headers={"Retry-After": "1"})


def refusal(status: int, message: str, **headers: str) -> web.Response:
    error = {"message": message, "type": "BadRequestError", "param": None, "code": status}
    return web.json_response({"error": error}, status=status, headers=headers)


@dataclass
class FakeServer:
    url: str = ""
    health: web.Response | None = None  # None: ready
    key: str | None = None
    models: tuple[str, ...] = ("demo",)
    answers: list[list[Piece]] = field(default_factory=list[list[Piece]])  # used up one by one
    refusals: list[web.Response] = field(default_factory=list[web.Response])  # instead of an answer
    metrics: str = METRICS
    tokens: int = 0  # generated; more at each look
    asked: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])  # bodies, in order
    looks: int = 0  # at the metrics
    left: asyncio.Event = field(default_factory=asyncio.Event)  # a client went while its answer was under way

    def app(self) -> web.Application:
        app = web.Application()
        for route in playground.ROUTES:
            app.router.add_route(route.method, route.path, route.handler)
        app.router.add_get("/health", self._health)
        app.router.add_get("/metrics", self._metrics)
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/v1/chat/completions", self._answer)
        app.router.add_post("/v1/completions", self._answer)
        return app

    def _stranger(self, request: web.Request) -> web.Response | None:
        if self.key is None or request.headers.get("Authorization") == f"Bearer {self.key}":
            return None
        return refusal(401, "An API key is needed.")

    async def _health(self, _: web.Request) -> web.Response:
        return copy(self.health) if self.health else web.json_response({"status": "ok"})

    async def _metrics(self, request: web.Request) -> web.Response:
        self.looks += 1
        self.tokens += 50
        return self._stranger(request) or web.Response(text=self.metrics % {"tokens": self.tokens})

    async def _models(self, request: web.Request) -> web.Response:
        cards = [{"id": name, "object": "model", "max_model_len": 2048} for name in self.models]
        return self._stranger(request) or web.json_response({"object": "list", "data": cards})

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        if refused := self._stranger(request):
            return refused
        self.asked.append(await request.json())
        if self.refusals:
            return self.refusals.pop(0)
        pieces = self.answers.pop(0) if self.answers else ["Hello", " there", "."]
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        chat = "chat" in request.path
        try:
            for piece in pieces:
                if isinstance(piece, asyncio.Event):
                    await piece.wait()
                elif isinstance(piece, bytes):
                    await response.write(piece)
                else:
                    await response.write(event(piece if isinstance(piece, dict) else chunk(piece, chat=chat)))
                    if isinstance(piece, dict):
                        await response.write(b"data: [DONE]\n\n")
                        return response
        except asyncio.CancelledError:
            self.left.set()
            raise
        said = sum(isinstance(piece, str) for piece in pieces)
        if said:
            usage = {"prompt_tokens": 12, "completion_tokens": said, "prompt_tokens_details": {"cached_tokens": 8}}
            await response.write(event(chunk("", chat=chat, finish="stop")) + event({"choices": [], "usage": usage}))
            await response.write(b"data: [DONE]\n\n")
        return response


def copy(response: web.Response) -> web.Response:
    """A response can be sent once."""
    return web.Response(body=response.body, status=response.status, content_type=response.content_type)


def chunk(text: str, *, chat: bool = True, finish: str | None = None) -> dict[str, Any]:
    said = {"delta": {"content": text}} if chat else {"text": text}
    return {"object": "chunk", "choices": [{"index": 0, "finish_reason": finish, **said}]}


def event(data: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(data)}\n\n".encode()


@asynccontextmanager
async def serving() -> AsyncGenerator[FakeServer]:
    server = FakeServer()
    # Handlers end when their client leaves, which is what a real server must do too.
    runner = web.AppRunner(server.app(), handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    server.url = f"http://127.0.0.1:{runner.addresses[0][1]}/"
    try:
        yield server
    finally:
        await runner.cleanup()
