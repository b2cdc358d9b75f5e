# SPDX-License-Identifier: Apache-2.0
"""Routes for operators: profiling, the prefix cache, sleep mode, aborting requests. They need a key of the scope admin.

Each runs in the engine between two steps and responds when it is done.
"""

import asyncio
from collections.abc import Coroutine
from functools import partial
from pathlib import Path
from typing import Annotated

from aiohttp import web
from pydantic import BaseModel, ConfigDict, Field

from jaxserve.errors import EngineError, JaxserveError
from jaxserve.server import params
from jaxserve.server.errors import ApiError, bad_request, sentence
from jaxserve.server.protocol.base import Strict
from jaxserve.server.routes.status import reply
from jaxserve.server.routes.table import Query, Route
from jaxserve.server.state import SERVING, Serving

MAX_IDS = 4096


class ProfileRequest(Strict):
    model_config = ConfigDict(title="ProfileRequest")

    folder: Annotated[
        str | None, Field(max_length=1024, description="Folder for the trace, relative to --profile-dir.")
    ] = None


class NoFields(Strict):
    model_config = ConfigDict(title="NoFields")


class AbortRequest(Strict):
    model_config = ConfigDict(title="AbortRequest")

    request_ids: Annotated[
        list[str] | None,
        Field(max_length=MAX_IDS, description="Response ids to abort (default: all requests in flight)."),
    ] = None


async def _body[B: BaseModel](request: web.Request, kind: type[B]) -> B:
    """Parse the body; an empty body means {}. Unknown fields are errors: {"ids": [...]} would abort everything."""
    return await params.parsed(request, kind, (await request.read()).strip() or b"{}", policy="refuse")


async def _ask(serving: Serving, name: str, **arguments: object) -> object:
    """Call the engine's method of this name. What its current state does not allow is a 409."""
    try:
        return await serving.check_engine().call(name, **arguments)
    except EngineError as error:
        raise serving.lost(error) from None
    except JaxserveError as error:
        raise ApiError(409, sentence(error.problem, error.hint), type="ConflictError") from None


# --- traces ---------------------------------------------------------------------------------------------------------


async def start_profile(request: web.Request) -> web.StreamResponse:
    serving = request.app[SERVING]
    body = await _body(request, ProfileRequest)
    folder = _below(serving.config.profile_dir, body.folder)
    await _ask(serving, "start_profile", folder=str(folder))
    return reply({"status": "tracing"})


def _below(root: str | None, wanted: str | None) -> Path:
    """The trace folder. A client's path must not lead outside --profile-dir."""
    if root is None:
        raise ApiError(403, "Profiling is disabled. Start the server with --profile-dir FOLDER.")
    base = Path(root).expanduser().resolve()
    try:
        folder = (base / (wanted or ".")).resolve()
    except (OSError, ValueError, RuntimeError):
        folder = base.parent
    if folder != base and base not in folder.parents:
        raise bad_request("folder", "folder is outside --profile-dir", "choose a folder inside it")
    return folder


async def stop_profile(request: web.Request) -> web.StreamResponse:
    serving = request.app[SERVING]
    await _body(request, NoFields)
    folder = Path(str(await _ask(serving, "stop_profile")))
    shown = await serving.workers.run(0, _shown, folder, serving.config.profile_dir)
    return reply({"status": "stopped", "folder": shown})


def _shown(folder: Path, root: str | None) -> str:
    """The path of the newest trace in `folder`, relative to --profile-dir."""
    base = folder if root is None else Path(root).expanduser().resolve()
    written = [path for path in folder.glob("plugins/profile/*") if path.is_dir()]
    last = max(written, key=lambda path: (path.stat().st_mtime_ns, path.name), default=folder)
    return str(last.relative_to(base)) if last.is_relative_to(base) else last.name


# --- the engine's memory --------------------------------------------------------------------------------------------


async def reset_prefix_cache(request: web.Request) -> web.StreamResponse:
    await _body(request, NoFields)
    await _ask(request.app[SERVING], "reset_prefix_cache")
    return reply({"status": "reset"})


async def sleep(request: web.Request) -> web.StreamResponse:
    """Reject new requests at once, and put the engine to sleep if nothing is in flight (else a 409)."""
    serving = request.app[SERVING]
    await _body(request, NoFields)
    level = request.query.get("level", "1")
    if level not in ("1", "2"):
        raise bad_request(
            "level", "level must be 1 or 2", "use 1 to keep the weights in host memory, 2 to discard them"
        )
    if serving.asleep:
        raise ApiError(409, "The engine is already asleep. Wake it with POST /wake_up.", type="ConflictError")
    serving.asleep = True
    shared = await _whatever_the_client_does(_fall_asleep(serving, int(level)))
    free_for = "all processes" if shared else "this server"
    return reply({"status": "asleep", "level": int(level), "memory_free_for": free_for})


async def _fall_asleep(serving: Serving, level: int) -> object:
    """Returns whether other processes can use the memory."""
    try:
        shared = await _ask(serving, "sleep", level=level)
    except BaseException:
        serving.asleep = False
        raise
    serving.metrics.sleep_level = level
    return shared


async def wake_up(request: web.Request) -> web.StreamResponse:
    serving = request.app[SERVING]
    await _body(request, NoFields)
    if serving.asleep:  # waking an awake engine succeeds
        await _whatever_the_client_does(_wake(serving))
    return reply({"status": "awake"})


async def _wake(serving: Serving) -> None:
    try:
        await _ask(serving, "wake")
    except ApiError as error:
        if error.status != 409 or serving.asleep:
            raise  # otherwise a concurrent request woke it
    serving.asleep = False
    serving.metrics.sleep_level = 0


async def _whatever_the_client_does[T](work: Coroutine[None, None, T]) -> T:
    """Run to the end even if the client disconnects, so that the recorded sleep state matches the engine's."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        task.add_done_callback(lambda done: done.cancelled() or done.exception())  # the client is gone: mark as read
        raise


async def is_sleeping(request: web.Request) -> web.StreamResponse:
    return reply({"is_sleeping": request.app[SERVING].asleep})


# --- requests -------------------------------------------------------------------------------------------------------


async def abort_requests(request: web.Request) -> web.StreamResponse:
    """Abort requests: each ends with finish_reason "abort". Ids that are not in flight are ignored."""
    serving = request.app[SERVING]
    body = await _body(request, AbortRequest)
    client = serving.check_engine()
    names: list[str] = []
    if body.request_ids is not None:
        wanted = set(body.request_ids)
        names = [name for name in client.names() if name in wanted or name.rpartition("-")[0] in wanted]
        if not names:
            return reply({"aborted": 0})
    try:
        return reply({"aborted": await client.abort(*names)})
    except EngineError as error:
        raise serving.lost(error) from None


_admin = partial(Route, "POST", scope="admin")

ROUTES = (
    _admin("/start_profile", start_profile, body=ProfileRequest, summary="Start a profiler trace."),
    _admin("/stop_profile", stop_profile, summary="Stop the profiler trace."),
    _admin("/reset_prefix_cache", reset_prefix_cache, summary="Clear the prefix cache."),
    _admin(
        "/sleep",
        sleep,
        query=(
            Query(
                "level",
                "integer",
                "1 (default) keeps the weights in host memory; 2 discards them and reloads on wake-up.",
            ),
        ),
        summary="Free device memory until /wake_up; with --enable-sleep-mode, other processes can use it.",
    ),
    _admin("/wake_up", wake_up, summary="Wake the engine from sleep."),
    Route("GET", "/is_sleeping", is_sleeping, scope="metrics", summary="Whether the engine is asleep."),
    _admin("/abort_requests", abort_requests, body=AbortRequest, summary="Abort requests in flight."),
)
