# SPDX-License-Identifier: Apache-2.0
"""What the server uses of aiohttp beyond its documentation: checked before the cap on its version is raised."""

import asyncio
import inspect
import re
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import http_writer, web
from aiohttp.test_utils import make_mocked_request
from aiohttp.web_protocol import RequestHandler

SERVER = Path(__file__).parents[3] / "jaxserve" / "server"
# Attribute, and where the server uses it.
INTERNALS = {
    "_waiter": "http/guard.py",  # RequestHandler: waits for the next request
    "_request_count": "http/guard.py",  # RequestHandler: requests whose head was read
    "_loop": "http/guard.py",
    "_lingering_time": "http/guard.py",  # RequestHandler: how long it reads the rest of a body after the response
    "_read_bytes": "http/guard.py",  # Request: what read() has returned and returns again
    "output_size": "app.py",  # StreamWriter: bytes written so far
    "_send_headers_immediately": "answers/sse.py",  # StreamResponse: else the headers are sent with the first write
}
OWN = {"_close_if_silent", "_await_head", "_connections", "_cut", "_timer", "_writing_timer"}


def test_the_version_is_capped() -> None:
    """The next minor version may change what is used here."""
    text = (SERVER.parents[1] / "pyproject.toml").read_text()
    [low, high] = re.findall(r'"aiohttp>=([\d.]+),<([\d.]+)"', text)[0]
    version = tuple(map(int, aiohttp.__version__.split(".")[:2]))
    assert tuple(map(int, low.split(".")[:2])) <= version < tuple(map(int, high.split(".")[:2]))


@pytest.mark.parametrize("name", INTERNALS)
def test_internals_are_used_where_this_list_says(name: str) -> None:
    assert re.search(rf"\.{name}\b", (SERVER / INTERNALS[name]).read_text())


def test_no_other_internals_are_used() -> None:
    """Of the classes that the server extends or whose private attributes it reads."""
    private = {name for kind in (RequestHandler, web.Request, web.StreamResponse) for name in _attributes(kind)}
    source = (SERVER / "http/guard.py").read_text() + (SERVER / "app.py").read_text()
    used = set(re.findall(r"\b(?:self|connection|other|request|response|writer)\.(_\w+)", source))
    assert used & private <= set(INTERNALS)


def _attributes(kind: type) -> set[str]:
    found: set[str] = set()
    for each in kind.__mro__:
        slots: Any = each.__dict__.get("__slots__", ())
        found |= {name for name in (*each.__dict__, *slots, *inspect.get_annotations(each)) if name.startswith("_")}
    return {name for name in found - OWN if not name.startswith("__")}


def test_a_waiting_connection_has_a_waiter() -> None:
    async def work() -> None:
        server = web.Server(lambda request: asyncio.sleep(0))  # pyright: ignore[reportArgumentType]
        listener = await asyncio.get_running_loop().create_server(server, "127.0.0.1", 0)
        async with listener:
            _, writer = await asyncio.open_connection(*listener.sockets[0].getsockname())
            while not (connections := server.connections):
                await asyncio.sleep(0.01)
            [connection] = connections
            await asyncio.sleep(0.05)
            assert isinstance(connection, RequestHandler)
            assert connection._waiter is not None and not connection._waiter.done()
            assert connection._request_count == 0 and connection._loop is asyncio.get_running_loop()
            writer.write(b"GET / HTTP/1.1\r\nHost: a\r\n")
            await asyncio.sleep(0.05)
            assert connection._request_count == 0 and not connection._waiter.done()  # the head is not whole
            writer.close()
        await server.shutdown()

    asyncio.run(work())


def test_read_returns_what_was_stored() -> None:
    async def work() -> None:
        request = make_mocked_request("POST", "/")
        request._read_bytes = b"kept"
        assert await request.read() == b"kept"

    asyncio.run(work())


def test_a_writer_counts_its_output() -> None:
    assert "output_size" in inspect.getsource(http_writer.StreamWriter.write_headers) or hasattr(
        http_writer.StreamWriter, "output_size"
    )
    assert "output_size" in inspect.getsource(http_writer.StreamWriter)
