# SPDX-License-Identifier: Apache-2.0
"""The application over a tiny model in this process, in a thread with an event loop of its own, on a free port.

All but the engine's process is the real thing: routes, middleware, connections, the real way to an engine.
"""

import asyncio
import itertools
import threading
from collections.abc import Iterable
from functools import partial
from types import SimpleNamespace
from typing import Any, Self, cast

import openai
from aiohttp import web

from jaxserve.async_llm import AsyncLLM
from jaxserve.server.app import make_app
from jaxserve.server.config import ServerConfig
from jaxserve.server.http.guard import Connections
from jaxserve.server.observe.prometheus import Metrics
from jaxserve.server.state import Serving
from tests.server.live import Client

MODEL = "tiny"


def openai_client(port: int) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=60)


def flat(lists: Iterable[list[Any]]) -> list[Any]:
    return list(itertools.chain.from_iterable(lists))


class Served(Client):
    def __init__(self, llm: AsyncLLM, **settings: Any) -> None:
        super().__init__(0)
        self.llm = llm
        self._config = ServerConfig(served_model_name=(MODEL, "owner/other-name"), **settings)
        self._loop = asyncio.new_event_loop()
        self._started = threading.Event()
        self._client: openai.OpenAI | None = None
        self._thread = threading.Thread(target=self._run, name="served", daemon=True)
        self.serving = cast(Serving, None)

    def __enter__(self) -> Self:
        self._thread.start()
        if not self._started.wait(60) or not self.port:
            raise RuntimeError("the application did not start")
        return self

    def __exit__(self, *_: object) -> None:
        if self._client is not None:
            self._client.close()
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(30)
        assert not self._thread.is_alive()

    def _run(self) -> None:
        try:
            self._loop.run_until_complete(self._serve())
        finally:
            self._started.set()
            self._loop.close()

    async def _serve(self) -> None:
        self._stop = asyncio.Event()
        state = SimpleNamespace(phase="ready", detail="", done=0, total=0, error=None)
        engine = SimpleNamespace(state=state, stats=None, pid=None)
        self.serving = serving = Serving(self._config, cast(Any, engine), metrics=Metrics("jaxserve", MODEL))
        front = self.llm._client  # pyright: ignore[reportPrivateUsage]
        serving.client, serving.tokenizer = front, front.preparer.tokenizer
        runner = web.AppRunner(make_app(serving), handler_cancellation=True, access_log=None, shutdown_timeout=1)
        await runner.setup()
        assert runner.server is not None
        factory = partial(Connections(self._config).factory, runner.server, self._loop)
        listener = await self._loop.create_server(factory, "127.0.0.1", 0)
        self.port = listener.sockets[0].getsockname()[1]
        self._started.set()
        try:
            await self._stop.wait()
        finally:
            listener.close()
            await runner.cleanup()
            serving.executor.shutdown()

    def client(self) -> openai.OpenAI:
        if self._client is None:
            self._client = openai_client(self.port)
        return self._client

    def in_flight(self) -> int:
        assert self.serving.client is not None
        return len(self.serving.client.names())
