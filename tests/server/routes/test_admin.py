# SPDX-License-Identifier: Apache-2.0
"""Routes for operators: traces, aborting all requests. The engine is a fake."""

import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.server import live as living
from tests.server.live import Live, wait

STREAM = {"prompt": [1, 2, 3], "max_tokens": 2000, "stream": True, "return_token_ids": True}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("traces")


@pytest.fixture(scope="module")
def server(root: Path) -> Iterator[Live]:
    with living.live(root, fake="slow=0.05", server={"profile_dir": str(root), "no_ui": True}) as one:
        yield one


@pytest.mark.parametrize("folder", ["..", "../x", "/etc", "a/../../b", "~", "a\x00b", "x" * 1100, 5, "link"])
def test_traces_stay_in_their_folder(server: Live, root: Path, folder: object) -> None:
    if not (root / "link").is_symlink():
        (root / "link").symlink_to("/tmp")
    reply = server.post("/start_profile", {"folder": folder})
    if folder == "~":  # a name like any other
        assert reply.status == 200
        assert server.post("/stop_profile").json["folder"].startswith("~/plugins/profile/2026_")
    else:
        assert (reply.status, reply.error["param"]) == (400, "folder")
        assert server.post("/stop_profile").status == 409


def test_a_trace(server: Live, root: Path) -> None:
    seen: set[str] = set()
    for body, below in ((None, ""), ({}, ""), ({"folder": "a/b"}, "a/b/"), ({"folder": "a/b"}, "a/b/")):
        assert server.post("/start_profile", body).json == {"status": "tracing"}
        again = server.post("/start_profile", body)
        assert (again.status, again.error["type"]) == (409, "ConflictError")  # and says no path
        stopped = server.post("/stop_profile").json
        assert set(stopped) == {"status", "folder"} and stopped["status"] == "stopped"
        assert stopped["folder"].startswith(f"{below}plugins/profile/2026_")
        assert (root / stopped["folder"]).is_dir()
        seen.add(stopped["folder"])
    assert len(seen) == 4  # each time that of this trace
    assert server.post("/start_profile", b"{").status == 400
    assert server.post("/start_profile", {"dir": "x"}).error["param"] == "dir"


@pytest.mark.parametrize("path", ["/stop_profile", "/reset_prefix_cache", "/sleep", "/wake_up"])
def test_routes_without_a_body(server: Live, path: str) -> None:
    reply = server.post(path, {"tags": ["weights"]})
    assert (reply.status, reply.error["param"]) == (400, "tags")
    assert server.post(path, b"[]").status == 400
    assert server.post(path, b"{").status == 400


def test_all_requests_are_ended(server: Live) -> None:
    with ExitStack() as stack:
        socks: list[socket.socket] = []
        for _ in range(5):
            socks.append(stack.enter_context(server.open_stream(**STREAM)))
        wait(lambda: server.metrics()["jaxserve:num_requests_running"] == 5, 20)
        assert server.get("/load").json == {"server_load": 5}
        assert server.post("/abort_requests").json == {"aborted": 5}
        for sock in socks:
            assert living.answer(sock).events[-1] == "[DONE]"
    assert server.post("/abort_requests", {}).json == {"aborted": 0}


def test_without_the_page(server: Live) -> None:
    assert server.get("/").status == 404
    assert server.get("/static/app.js").status == 404
