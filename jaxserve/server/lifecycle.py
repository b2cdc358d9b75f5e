# SPDX-License-Identifier: Apache-2.0
"""Runs the server: opens the port, starts the engine's process, serves requests, and drains at the end.

    serve(engine, server) -> exit code
      0          SIGTERM or SIGINT: ended after the requests in flight, or after shutdown_timeout
      128 + n    a second signal: ended immediately
      1          the engine failed, and restarts are off or exhausted

Raises a JaxserveError for a fault in the configuration, the port or the certificate, before anything is loaded, and for
an engine that does not start.
"""

import asyncio
import gc
import os
import signal
import socket
import ssl
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from importlib import import_module
from typing import cast

from aiohttp import web

from jaxserve.config import EngineConfig
from jaxserve.errors import EngineError
from jaxserve.frontend.client import connect
from jaxserve.frontend.pooling_files import pooling_of
from jaxserve.frontend.process import EngineProcess
from jaxserve.server.app import make_app
from jaxserve.server.config import MAX_QUEUED, ServerConfig
from jaxserve.server.http import listening, reload
from jaxserve.server.http.addresses import is_loopback
from jaxserve.server.http.guard import Connections
from jaxserve.server.observe import banner, logs
from jaxserve.server.observe.prometheus import Metrics
from jaxserve.server.state import Serving

MAX_RESTARTS = 3
RESTART_WINDOW = 600.0  # seconds within which MAX_RESTARTS are allowed
LAST_WORDS = 2.0  # seconds to send the last responses
ENGINE_GRACE = 5.0  # seconds for an engine to exit
HANDSHAKE_SECONDS = 10.0
# How long a thread that tokenizes or renders may keep Python's lock while the event loop waits for it; Python's own
# value is 5 ms.
SWITCH_SECONDS = 0.001
GC_OBJECTS = 20_000  # allocations between two garbage collections


def serve(engine_config: EngineConfig, server_config: ServerConfig, *, command: Sequence[str] | None = None) -> int:
    """Serve until a signal. `command` replaces the default command that starts the engine's process."""
    config = server_config.with_environment(os.environ)
    config.template()
    if engine_config.max_num_queued_reqs is None:
        engine_config = replace(engine_config, max_num_queued_reqs=MAX_QUEUED)
    context = listening.tls(config)
    sockets = listening.bind(config)
    logs.configure(config)
    sys.setswitchinterval(SWITCH_SECONDS)
    try:
        return asyncio.run(Life(engine_config, config, sockets=sockets, context=context, command=command).run())
    finally:
        listening.close(config, sockets)


class Life:
    def __init__(
        self,
        engine_config: EngineConfig,
        config: ServerConfig,
        *,
        sockets: list[socket.socket],
        context: ssl.SSLContext | None,
        command: Sequence[str] | None,
    ) -> None:
        self._engine_config, self._config = engine_config, config
        self._sockets, self._context, self._command = sockets, context, command
        self._changed = asyncio.Event()  # set on a change of the engine's state, and on signals
        self._signals: list[int] = []
        self._restarts: list[float] = []

    async def run(self) -> int:
        loop, config = asyncio.get_running_loop(), self._config
        names = config.served_model_name or (self._engine_config.model,)
        metrics = Metrics(config.metrics_prefix, names[0])
        serving = Serving(config, self._engine(), metrics=metrics)
        serving.model_names = names
        metrics.stats = lambda: serving.engine.stats
        metrics.engine_pid = lambda: serving.engine.pid
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._signalled, number)
        logs.mask(serving.keys.secrets)
        if reload.reloads(config):
            loop.add_signal_handler(signal.SIGHUP, reload.reload, config, self._context, serving.keys)
        runner = web.AppRunner(make_app(serving), handler_cancellation=True, shutdown_timeout=LAST_WORDS)
        await runner.setup()
        listeners = await self._listen(runner, serving)
        throughput = asyncio.create_task(self._log_throughput(serving))
        try:
            self._introduce()
            return await self._live(serving)
        finally:
            throughput.cancel()
            await self._end(serving, runner, listeners)

    async def _listen(self, runner: web.AppRunner, serving: Serving) -> list[asyncio.Server]:
        loop, server, connections = asyncio.get_running_loop(), runner.server, Connections(self._config)
        if server is None:
            raise RuntimeError("the application was not set up")
        serving.metrics.connections = lambda: len(connections.open)
        handshake = HANDSHAKE_SECONDS if self._context else None
        factory = partial(connections.factory, server, loop)
        return [
            await loop.create_server(
                factory, sock=opened, ssl=self._context, ssl_handshake_timeout=handshake, backlog=listening.BACKLOG
            )
            for opened in self._sockets
        ]

    def _introduce(self) -> None:
        url = listening.place(self._config, self._sockets)
        others = " and all other addresses of this machine" if listening.everywhere(self._sockets) else ""
        logs.LOG.info("listening on %s%s, loading %s", url, others, self._engine_config.model)
        if not self._config.keyed and not is_loopback(self._config.host):
            logs.LOG.warning(
                "ANYONE WHO REACHES %s CAN USE THIS SERVER: no API key is set. Set --api-key, or use --host 127.0.0.1",
                self._config.host,
            )

    async def _log_throughput(self, serving: Serving) -> None:
        line = logs.Throughput()
        while not self._config.disable_log_stats:
            line.tell(serving.engine.stats)
            await asyncio.sleep(logs.STATS_SECONDS)

    # --- events -----------------------------------------------------------------------------------------------------

    def _engine(self) -> EngineProcess:
        loop = asyncio.get_running_loop()

        def changed(_: object) -> None:
            with suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(self._changed.set)

        watchdog = self._config.watchdog_timeout or None
        json_log = self._config.log_format == "json"
        return EngineProcess(
            self._engine_config, watchdog=watchdog, command=self._command, json_log=json_log, on_change=changed
        )

    def _signalled(self, number: int) -> None:
        self._signals.append(number)
        self._changed.set()

    async def _when(self, condition: Callable[[], object]) -> None:
        while not condition():
            self._changed.clear()
            await self._changed.wait()

    # --- engines, one after another ---------------------------------------------------------------------------------

    async def _live(self, serving: Serving) -> int:
        was_ready = False
        while True:
            was_ready |= await self._served(serving)
            if self._signals:
                return await self._drain(serving)
            serving.lose_engine()
            error = serving.engine.state.error or "the engine process exited; see its log"
            if not was_ready:
                problem, _, hint = error.rpartition("; ")
                raise EngineError(problem, hint)
            logs.LOG.error("the engine failed: %s", error)
            if not self._may_restart():
                return 1
            await asyncio.to_thread(serving.engine.stop, 0.0)
            serving.engine = self._engine()
            serving.metrics.restarts += 1
            logs.LOG.warning("restarting the engine")

    async def _served(self, serving: Serving) -> bool:
        """Run one engine until it fails or a signal arrives. Returns whether it was ever ready."""
        engine = serving.engine
        engine.start()
        opening = asyncio.create_task(self._open(serving))
        ending = asyncio.create_task(self._when(lambda: self._signals or engine.state.phase == "failed"))
        try:
            await asyncio.wait((opening, ending), return_when=asyncio.FIRST_COMPLETED)
            if opening.done():
                opening.result()
                await ending
            return serving.client is not None
        finally:
            opening.cancel()
            ending.cancel()

    async def _open(self, serving: Serving) -> None:
        """Wait until the engine is ready, then accept requests. Loads the tokenizer while the engine compiles."""
        engine = serving.engine
        importing = None
        if not self._engine_config.skip_tokenizer_init:
            # The import takes a second or more; it overlaps with the import of jax in the engine's process.
            importing = _in_thread(partial(import_module, "transformers.models.auto.tokenization_auto"))
        await self._when(lambda: engine.opened is not None)
        if importing is not None:
            await importing
        try:
            client = await _in_thread(partial(connect, engine, self._engine_config))
        except EngineError:
            return  # the engine has failed
        folder = engine.opened.folder if engine.opened else None
        words = self._config.classifier_from_token
        pooling = await _in_thread(partial(pooling_of, folder, client.preparer.tokenizer, words))
        await self._when(lambda: engine.state.phase == "ready")
        serving.take_engine(client, pooling)
        gc.collect()
        gc.freeze()  # exclude imported modules from later collections, which delay requests
        # Generating tokens creates no cycles; Python's default thresholds would take 6 % of the time.
        gc.set_threshold(GC_OBJECTS, 20, 50)
        url, everywhere = listening.url(self._config, self._sockets), listening.everywhere(self._sockets)
        lines = await asyncio.to_thread(banner.ready, serving, url, everywhere=everywhere)
        banner.show(lines, self._config)

    def _may_restart(self) -> bool:
        now = time.monotonic()
        self._restarts = [moment for moment in self._restarts if now - moment < RESTART_WINDOW]
        if not self._config.restart_engine:
            return False
        if len(self._restarts) == MAX_RESTARTS:
            logs.LOG.error("the engine failed too often: %d times in %g s", MAX_RESTARTS + 1, RESTART_WINDOW)
            return False
        self._restarts.append(now)
        return True

    # --- the end ----------------------------------------------------------------------------------------------------

    async def _drain(self, serving: Serving) -> int:
        """Report to probes that the server is shutting down, and let requests in flight finish."""
        serving.draining = True
        timeout = self._config.shutdown_timeout
        if not serving.in_flight:
            logs.LOG.info("shutting down")
        else:
            logs.LOG.info(
                "shutting down: waiting up to %g s for requests in flight (%d); signal again to end now",
                timeout,
                serving.in_flight,
            )
        idle = asyncio.create_task(serving.wait_idle(timeout))
        now = asyncio.create_task(self._when(lambda: len(self._signals) > 1 or serving.engine.state.phase == "failed"))
        await asyncio.wait((idle, now), return_when=asyncio.FIRST_COMPLETED)
        idle.cancel()
        now.cancel()
        if len(self._signals) > 1:
            return 128 + self._signals[1]
        return 1 if serving.engine.state.phase == "failed" else 0

    async def _end(self, serving: Serving, runner: web.AppRunner, listeners: list[asyncio.Server]) -> None:
        """Stop the engine and the listeners. Requests still in flight get an error."""
        serving.draining = True
        at_once = len(self._signals) != 1 or serving.engine.state.phase == "failed"
        await asyncio.to_thread(serving.engine.stop, 0.0 if at_once else ENGINE_GRACE)
        await serving.wait_idle(LAST_WORDS)
        for listener in listeners:
            listener.close()
        await runner.cleanup()
        serving.workers.shutdown()
        if serving.tracer is not None:
            await asyncio.to_thread(serving.tracer.shutdown)


def _in_thread[T](function: Callable[[], T]) -> "asyncio.Future[T]":
    """Like asyncio.to_thread, but does not delay the process's exit: the function may be downloading."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def finish(result: T | None, error: BaseException | None) -> None:
        if future.done():
            return
        if error is None:
            future.set_result(cast("T", result))
        else:
            future.set_exception(error)

    def work() -> None:
        try:
            result, fault = function(), None
        except BaseException as error:
            result, fault = None, error
        with suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(finish, result, fault)

    threading.Thread(target=work, daemon=True).start()
    return future
