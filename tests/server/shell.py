# SPDX-License-Identifier: Apache-2.0
"""The application without an engine, in a thread of this process: for all that handlers do without one."""

import asyncio
import threading
import time
from functools import partial
from types import SimpleNamespace
from typing import Any, Self, cast

from aiohttp import web

from jaxserve.server.app import make_app
from jaxserve.server.config import ServerConfig
from jaxserve.server.http.guard import Connections
from jaxserve.server.observe.prometheus import Metrics
from jaxserve.server.state import Serving
from tests.server.live import Client

MODEL = "tiny"


class Shell(Client):
    """with Shell(api_key=("secret",)) as server: ..."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(0)
        config = ServerConfig(**{"served_model_name": (MODEL,), **settings})
        self.loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.engine = SimpleNamespace(
            state=SimpleNamespace(phase="starting", detail="compiling 7/18", done=7, total=18, since=time.monotonic()),
            stats=None,
            pid=None,
        )
        self.serving = Serving(config, cast(Any, self.engine), metrics=Metrics("jaxserve", MODEL))
        self.connections = Connections(config)

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._started.wait(60) and self.port, "the application did not start"
        return self

    def __exit__(self, *_: object) -> None:
        self.loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(30)
        assert not self._thread.is_alive()

    def _run(self) -> None:
        try:
            self.loop.run_until_complete(self._serve())
        finally:
            self._started.set()
            self.loop.close()

    async def _serve(self) -> None:
        runner = web.AppRunner(make_app(self.serving), handler_cancellation=True, shutdown_timeout=1)
        await runner.setup()
        assert runner.server is not None
        factory = partial(self.connections.factory, runner.server, self.loop)
        listener = await self.loop.create_server(factory, "127.0.0.1", 0, backlog=512)
        self.port = listener.sockets[0].getsockname()[1]
        self._started.set()
        await self._stop.wait()
        listener.close()
        await runner.cleanup()
        self.serving.workers.shutdown()
