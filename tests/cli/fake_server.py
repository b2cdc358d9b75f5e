# SPDX-License-Identifier: Apache-2.0
"""A fake server with as much of OpenAI's API as the commands use. It records the requests."""

import asyncio
import json
import threading
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from aiohttp import web

PIECES = ("Hel", "lo", " wörld", "!")
KEY = "secret"


class FakeServer:
    """`faults` by path: a status, or "cut" (no [DONE]), "late" (an error event), "junk"."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, Any]] = []
        self.faults: dict[str, int | str] = {}
        self.pieces: tuple[str, ...] = PIECES
        self.message = "The server is loading the model."  # that goes with a status
        self.needs_key = False
        self.has_tokenize = True
        self.pause = 0.0
        self.most_at_once = self.going = 0
        self.port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def bodies(self, path: str) -> list[Any]:
        return [body for asked, body in self.asked if asked == path]

    def app(self) -> web.Application:
        @web.middleware
        async def guard(request: web.Request, handler: Any) -> web.StreamResponse:
            return await self._guard(request, handler)

        app = web.Application(middlewares=[guard])
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/v1/completions", self._generate)
        app.router.add_post("/v1/chat/completions", self._generate)
        if self.has_tokenize:
            app.router.add_post("/tokenize", self._tokenize)
        app.router.add_post("/start_profile", self._empty)
        app.router.add_post("/stop_profile", self._empty)
        return app

    async def _guard(self, request: web.Request, handler: Any) -> web.StreamResponse:
        body = await request.json() if request.can_read_body else None
        self.asked.append((request.path, body))
        if self.needs_key and request.headers.get("Authorization") != f"Bearer {KEY}":
            return _error(401, "Unauthorized")
        fault = self.faults.get(request.path)
        if isinstance(fault, int):
            return _error(fault, self.message)
        if fault == "junk":
            return web.Response(text="<html>")
        return await handler(request)

    async def _models(self, request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": "fake", "object": "model"}]})

    async def _tokenize(self, request: web.Request) -> web.Response:
        return web.json_response({"tokens": [5, 6, 7, 8, 5], "count": 5, "max_model_len": 64})

    async def _empty(self, request: web.Request) -> web.Response:
        return web.Response()

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        self.going += 1
        self.most_at_once = max(self.most_at_once, self.going)
        try:
            return await self._stream(request)
        finally:
            self.going -= 1

    async def _stream(self, request: web.Request) -> web.StreamResponse:
        chat, fault = request.path.endswith("chat/completions"), self.faults.get(request.path)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)

        async def send(data: Any) -> None:
            await response.write(b"data: " + (data if isinstance(data, bytes) else json.dumps(data).encode()) + b"\n\n")

        if chat:
            await send({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}], "usage": None})
        for piece in self.pieces:
            await asyncio.sleep(self.pause)
            part = {"delta": {"content": piece}} if chat else {"text": piece}
            await send({"choices": [{"index": 0, **part}], "usage": None})
        if fault == "late":
            await send({"error": {"message": "the engine failed", "type": "InternalServerError"}})
        if fault != "cut":
            usage = {"prompt_tokens": 11, "completion_tokens": len(self.pieces), "total_tokens": 15}
            await send({"choices": [], "usage": usage})
            await send(b"[DONE]")
        await response.write_eof()
        return response


def _error(status: int, message: str) -> web.Response:
    content = {"error": {"message": message, "type": "X", "param": None, "code": status}}
    return web.json_response(content, status=status)


@contextmanager
def running(fake: FakeServer, *, path: str | None = None) -> Generator[FakeServer]:
    """Serve in a thread, on a free port or on the Unix socket at `path`."""
    loop, ready = asyncio.new_event_loop(), threading.Event()
    stop = asyncio.Event()

    async def live() -> None:
        runner = web.AppRunner(fake.app(), shutdown_timeout=0.1)
        await runner.setup()
        if path is None:
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            fake.port = runner.addresses[0][1]
        else:
            await web.UnixSite(runner, path).start()
        ready.set()
        await stop.wait()
        await runner.cleanup()

    thread = threading.Thread(target=loop.run_until_complete, args=(live(),))
    thread.start()
    try:
        assert ready.wait(10)
        yield fake
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(10)
        loop.close()
