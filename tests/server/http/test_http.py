# SPDX-License-Identifier: Apache-2.0
"""Malformed, huge, slow, silent and unread HTTP. Each connection ends, and every answer is the server's."""

import contextlib
import functools
import gzip
import logging
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from jaxserve.server.http import guard
from tests.server.live import answer, closed, post, wait
from tests.server.shell import Shell
from tests.server.watch import Watch

FAST = {"header_timeout": 1.0, "body_timeout": 1.0, "keep_alive_timeout": 1.0, "stream_timeout": 1.0}
MANY = 300


@pytest.fixture(scope="module")
def shell() -> Iterator[Shell]:
    with Shell(max_body_bytes=2**20) as server:
        yield server


@pytest.fixture(scope="module")
def ready(shell: Shell) -> Shell:
    """A server that passes requests to handlers, which then fail for lack of an engine."""
    shell.serving.check_engine = lambda: None  # pyright: ignore[reportAttributeAccessIssue]
    return shell


@pytest.fixture(scope="module")
def fast() -> Iterator[Shell]:
    with Shell(**FAST, max_body_bytes=2**20) as server:
        server.serving.check_engine = lambda: None  # pyright: ignore[reportAttributeAccessIssue]
        yield server


# --- shapes ---------------------------------------------------------------------------------------------------------


def test_statuses_of_the_server_itself(shell: Shell) -> None:
    for method, path, status, kind in (
        ("GET", "/nothing", 404, "NotFoundError"),
        ("PUT", "/version", 405, "MethodNotAllowedError"),
        ("POST", "/health", 405, "MethodNotAllowedError"),
        ("GET", "/v1/completions", 405, "MethodNotAllowedError"),
        ("BREW", "/version", 400, "BadRequestError"),
        ("POST", "/v1/completions", 503, "ServiceUnavailableError"),
    ):
        reply = shell.send(method, path)
        assert (reply.status, reply.error["type"], reply.error["code"]) == (status, kind, status)
        assert reply.headers["content-type"] == "application/json; charset=utf-8"
        assert reply.headers["server"] == "jaxserve"
    assert shell.get("/version").headers["x-content-type-options"] == "nosniff"
    assert shell.send("PUT", "/version").headers["allow"] == "GET,HEAD"
    assert int(shell.post("/v1/completions", {}).headers["retry-after"]) >= 1


def test_while_it_loads_a_client_learns_when_to_ask_again(shell: Shell) -> None:
    state = shell.engine.state
    for done, seconds, low, high in ((7, 70, 60, 60), (7, 7, 11, 12), (17, 1, 2, 2), (0, 30, 5, 5)):
        state.done, state.since = done, time.monotonic() - seconds
        assert low <= int(shell.post("/v1/completions", {}).headers["retry-after"]) <= high
    state.done = 7


def test_while_it_starts(shell: Shell) -> None:
    health = shell.get("/health")
    assert (health.status, health.json) == (
        503,
        {"status": "starting", "detail": "compiling 7/18", "done": 7, "total": 18},
    )
    assert shell.get("/live").json == {"status": "live"}
    assert shell.send("POST", "/ping").status == shell.get("/ping").status == 503
    assert shell.get("/load").json == {"server_load": 0}
    assert b"jaxserve:engine_up" in shell.get("/metrics").body
    assert shell.send("HEAD", "/health").body == b""


def test_after_the_engine_failed(shell: Shell) -> None:
    shell.engine.state.phase = "failed"
    try:
        assert (shell.get("/health").status, shell.get("/live").status) == (503, 503)
        assert "failed" in shell.post("/v1/completions", {}).error["message"]
        shell.serving.draining = True  # it ends for that
        assert shell.get("/health").json["status"] == "failed"
        assert shell.get("/live").status == 503
    finally:
        shell.engine.state.phase, shell.serving.draining = "starting", False


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"\r\n\r\n\x00\r\n\r\n", 400),
        (b"hello\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400),  # TLS
        (b"GET /version\r\n\r\n", 400),
        (b"GET /version HTTP/9.9\r\nHost: localhost\r\n\r\n", 400),
        (b"GET /version HTTP/1.1\r\nHost: localhost\r\nBroken\r\n\r\n", 400),
        (b"GET /version HTTP/1.1\r\nHost: localhost\r\nA: b\r\n c\r\n\r\n", 400),
        (b"GET /version HTTP/1.1\r\nHost: localhost\r\nA\x00: b\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
        (b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n", 400),
        (b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\na", 400),
        (b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1e3\r\n\r\n", 400),
        (b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked, gzip\r\n\r\n", 400),
        (b"GET /version HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 10_000_000 + b"\r\n\r\n", 400),
        (b"GET /version HTTP/1.1\r\nHost: localhost\r\nX-Request-Id: " + b"a" * 65536 + b"\r\n\r\n", 400),
        (b"GET /version HTTP/1.1\r\nHost: localhost\r\n" + b"X: a\r\n" * 300 + b"\r\n", 400),
        (b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
        (b"GET /version HTTP/1.1\r\nHost: localhost\r\nExpect: a-pony\r\n\r\n", 417),
    ],
)
def test_invalid_http(shell: Shell, data: bytes, status: int) -> None:
    with shell.connect() as sock:
        with contextlib.suppress(ConnectionError):  # it need not read all of ten megabytes
            sock.sendall(data)
        try:
            reply = answer(sock)
        except ConnectionError:
            assert len(data) > 1_000_000
        else:
            assert reply.status == status
            assert reply.error["code"] == status
            assert "localhost" not in reply.body.decode()  # nothing of what was sent
    assert shell.get("/version").status == 200


@pytest.mark.parametrize("path", ["/health", "/live", "/ping", "/metrics"])
def test_probes_over_http_1_0_need_no_host(shell: Shell, path: str) -> None:
    """Load balancers send such; only HTTP/1.1 requires the header."""
    with_host = shell.get(path).status
    assert shell.raw(f"GET {path} HTTP/1.0\r\n\r\n".encode()).status == with_host
    assert shell.raw(f"GET {path} HTTP/1.1\r\n\r\n".encode()).status == 400
    assert shell.raw(f"GET {path} HTTP/1.0\r\nHost: elsewhere.example\r\n\r\n".encode()).status == 403
    assert shell.raw(b"GET /version HTTP/1.0\r\n\r\n").status == 400


# --- bodies ---------------------------------------------------------------------------------------------------------


@functools.cache
def unpacks_to_much_more() -> bytes:
    packed = gzip.compress(b"0" * 200_000_000)
    assert len(packed) < 250_000
    return packed


def test_bodies_that_are_too_large(ready: Shell) -> None:
    head = b"POST /sleep HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    packed = unpacks_to_much_more()
    for data in (
        head + b"Content-Length: 1000000000\r\n\r\n",
        head + b"Content-Length: 1048577\r\n\r\n" + b" " * 1048577,
        head + b"Transfer-Encoding: chunked\r\n\r\n" + b"10000\r\n%b\r\n" % (b" " * 65536) * 17,
        head + b"Content-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(packed) + packed,
    ):
        begin = time.monotonic()
        reply = ready.raw(data)
        assert (reply.status, reply.error["type"]) == (413, "RequestTooLargeError")
        assert time.monotonic() - begin < 3
    assert ready.send("POST", "/sleep?level=7", b" " * 2**20).status == 400  # exactly as much as may be


@pytest.mark.parametrize(
    ("path", "status"), [("/sleep", 413), ("/nothing", 404), ("/health", 405), ("/v1/completions/", 413)]
)
def test_bodies_that_unpack_to_much_more_do_not_stop_the_event_loop(ready: Shell, path: str, status: int) -> None:
    """Neither before nor after the response: the rest of the body was read for two seconds."""
    packed = unpacks_to_much_more()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Encoding: gzip\r\n"
    data = head.encode() + b"Content-Length: %d\r\n\r\n" % len(packed) + packed
    watch = Watch(ready.loop)
    with ThreadPoolExecutor(8) as clients:
        replies = list(clients.map(lambda _: ready.raw(data).status, range(8)))
    time.sleep(0.5)  # the rest of a body would be read after its response
    assert replies == [status] * 8
    assert watch.end() < 0.7


@pytest.mark.parametrize("encoding", ["compress", "x-gzip2", "gzip, gzip", "utf-8", "br", "zstd"])
def test_unknown_encodings_of_bodies_are_refused(ready: Shell, encoding: str) -> None:
    reply = ready.send("POST", "/sleep?level=7", b"{}", {"Content-Encoding": encoding})
    assert reply.status == 415 and encoding in reply.error["message"]
    assert reply.headers["accept-encoding"] == "gzip, deflate"
    for known, body in (("gzip", gzip.compress(b"{}")), ("GZIP", gzip.compress(b"{}")), ("identity", b"{}")):
        assert ready.send("POST", "/sleep?level=7", body, {"Content-Encoding": known}).status == 400  # for its level


@pytest.mark.parametrize(
    "head", ["GET /" + "a" * 100_000 + " HTTP/1.1", "GET /version HTTP/1.1\r\nX-Request-Id: " + "a" * 9000]
)
def test_a_line_that_is_too_long_is_not_repeated(shell: Shell, head: str) -> None:
    error = shell.raw(f"{head}\r\nHost: localhost\r\n\r\n".encode()).error
    assert "longer than 8190 bytes" in error["message"] and "aaa" not in error["message"]


def test_a_body_that_is_too_large_names_the_remedy(ready: Shell) -> None:
    message = ready.send("POST", "/sleep", b" " * (2**20 + 1)).error["message"]
    assert message.startswith("The request body is larger than 1048576 bytes.") and "--max-body-bytes" in message


def test_bodies_that_are_broken(ready: Shell, caplog: pytest.LogCaptureFixture) -> None:
    head = b"POST /sleep?level=7 HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    for name in ("jaxserve", "jaxserve.server", "aiohttp"):
        logging.getLogger(name).propagate = True
    for rest in (
        b"Content-Encoding: gzip\r\nContent-Length: 9\r\n\r\nno gzip..",
        b"Content-Encoding: gzip\r\nContent-Length: 2\r\n\r\nxx",
        b"Content-Encoding: gzip\r\nContent-Length: 20\r\n\r\n" + gzip.compress(b" " * 100)[:20],
        b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"Transfer-Encoding: chunked\r\n\r\n-1\r\na\r\n",
        b"Transfer-Encoding: chunked\r\n\r\nffffffffffffffffffff\r\n",
    ):
        assert ready.raw(head + rest).status in (400, 413)
    time.sleep(0.1)  # what is said after the answers
    loud = [record for record in caplog.records if record.levelno >= logging.ERROR or record.exc_info]
    assert not loud, loud  # else any client fills the log


def test_a_byte_in_each_chunk(ready: Shell) -> None:
    begin = time.monotonic()
    head = b"POST /sleep?level=7 HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    reply = ready.raw(head + b"1\r\n \r\n" * 500_000 + b"0\r\n\r\n")
    assert reply.error["param"] == "level"
    assert time.monotonic() - begin < 10


def test_all_bodies_together_are_bounded(ready: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "MAX_BODIES", 1000)
    assert ready.send("POST", "/sleep?level=7", b" " * 2000).status == 400  # a small one is taken all the same
    monkeypatch.setattr(guard, "SMALL_BODY", 100)
    with ready.connect() as first:
        first.sendall(post("/sleep", b" " * 2000)[:-900])  # holds what came of it
        assert answer(first).status == 503
    assert ready.send("POST", "/sleep?level=7", b" " * 900).status == 400  # and it was given back
    assert ready.send("POST", "/sleep?level=7", b" " * 900).status == 400


def test_expect_100_continue(ready: Shell) -> None:
    with ready.connect() as sock:
        sock.sendall(post("/sleep?level=7", b"{}", "Expect: 100-continue")[:-2])
        assert sock.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        sock.sendall(b"{}")
        assert answer(sock).error["param"] == "level"


def test_pipelined_requests(shell: Shell) -> None:
    with shell.connect() as sock:
        sock.sendall(b"GET /version HTTP/1.1\r\nHost: localhost\r\n\r\n" * 20)
        wait(lambda: sock.recv(2**16, socket.MSG_PEEK).count(b"HTTP/1.1 200") == 20)


# --- slow and silent ------------------------------------------------------------------------------------------------


def test_incomplete_headers_are_closed(fast: Shell) -> None:
    with contextlib.ExitStack() as stack:
        socks = [stack.enter_context(fast.connect()) for _ in range(MANY)]
        for number, sock in enumerate(socks):
            if number % 3:
                sock.sendall(b"GET /version HTTP/1.1\r\nHost: local")
        begin = time.monotonic()
        while time.monotonic() - begin < 0.8:  # a byte now and then does not help them
            for sock in socks[1::30]:
                with contextlib.suppress(ConnectionError):
                    sock.sendall(b"a")
            assert fast.get("/version").status == 200
            time.sleep(0.1)
        assert all(closed(sock, 5) for sock in socks)
    assert time.monotonic() - begin < 8


def test_slow_bodies_are_cut_off(fast: Shell) -> None:
    with contextlib.ExitStack() as stack:
        socks = [stack.enter_context(fast.connect()) for _ in range(50)]
        for sock in socks:
            sock.sendall(post("/sleep", b" " * 500)[:-499])
        begin = time.monotonic()
        while time.monotonic() - begin < 0.8:
            for sock in socks:
                with contextlib.suppress(ConnectionError):  # cut early, if this is late
                    sock.sendall(b" ")
            assert fast.get("/version").status == 200
            time.sleep(0.1)
        for sock in socks:
            reply = answer(sock)
            assert (reply.status, reply.error["type"]) == (408, "RequestTimeoutError")
            assert closed(sock, 5)
    assert time.monotonic() - begin < 8


def test_slow_headers_of_a_later_request_are_cut_off() -> None:
    head = b"GET /version HTTP/1.1\r\nHost: localhost\r\nA: "
    with Shell(header_timeout=1.0, keep_alive_timeout=60.0) as server, contextlib.ExitStack() as stack:
        slow, idle, halves = (stack.enter_context(server.connect()) for _ in range(3))
        for sock in (slow, idle, halves):
            sock.sendall(head + b"\r\n\r\n")
            assert answer(sock).status == 200
        idle.sendall(b"\r\n")  # what some clients send after a body; no head
        begin = time.monotonic()
        with contextlib.suppress(ConnectionError):
            while time.monotonic() - begin < 20:
                slow.sendall(head[:1])
                head = head[1:] or b"a"
                halves.sendall(b"GET /version HT")
                time.sleep(0.3)
                halves.sendall(b"TP/1.1\r\nHost: localhost\r\n\r\n")
                assert answer(halves).status == 200
        assert 0.9 < time.monotonic() - begin < 8
        assert closed(slow, 5)
        idle.sendall(b"GET /version HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert answer(idle).status == 200


def test_stalled_bodies_are_cut_off() -> None:
    with Shell(header_timeout=1.0, body_timeout=60.0) as server, server.connect() as slow, server.connect() as steady:
        server.serving.check_engine = lambda: None  # pyright: ignore[reportAttributeAccessIssue]
        slow.sendall(post("/sleep", b" " * 500)[:-499])
        steady.sendall(post("/sleep?level=7", b" " * 50_000)[:-50_000])
        begin = time.monotonic()
        for _ in range(10):
            with contextlib.suppress(ConnectionError):
                slow.sendall(b" ")
            steady.sendall(b" " * 5000)
            time.sleep(0.2)
        reply = answer(slow)
        assert (reply.status, reply.error["type"]) == (408, "RequestTimeoutError")
        assert time.monotonic() - begin < 8
        assert answer(steady).error["param"] == "level"


def test_idle_connections_are_closed(fast: Shell) -> None:
    with contextlib.ExitStack() as stack:
        socks = [stack.enter_context(fast.connect()) for _ in range(MANY)]
        for sock in socks:
            sock.sendall(b"GET /version HTTP/1.1\r\nHost: localhost\r\n\r\n")
        for sock in socks:
            assert answer(sock).status == 200
        # Half a second head is no reason to wait.
        socks[0].sendall(b"GET /version HTTP/1.1\r\nHo")
        assert all(closed(sock, 5) for sock in socks)
    wait(lambda: not fast.connections.open, 5)


def test_a_client_that_reads_nothing_is_disconnected(fast: Shell) -> None:
    with fast.connect() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.settimeout(0.2)
        begin = time.monotonic()
        with pytest.raises(ConnectionError):
            while time.monotonic() - begin < 15:
                with contextlib.suppress(TimeoutError):
                    sock.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n" * 100)
                assert fast.get("/version").status == 200
    wait(lambda: not fast.connections.open, 5)


def test_a_client_that_leaves_a_little_unread_is_disconnected(fast: Shell) -> None:
    with contextlib.ExitStack() as stack:
        for count in (1, 2, 4, 8, 16, 32, 64):
            sock = stack.enter_context(fast.connect())
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n" * count)
        wait(lambda: not fast.connections.open, 10)


def test_beyond_the_limit_the_longest_idle_connection_is_closed() -> None:
    with Shell(max_connections=4) as server, contextlib.ExitStack() as stack:
        socks = [stack.enter_context(server.connect()) for _ in range(4)]
        for sock in (socks[1], socks[2], socks[3], socks[0]):
            sock.sendall(b"GET /version HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert answer(sock).status == 200
        with server.connect() as fresh:
            fresh.sendall(b"GET /version HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert answer(fresh).status == 200
            assert closed(socks[1], 5)
            assert not any(closed(sock, 0.1) for sock in (socks[0], socks[2], socks[3]))


def test_beyond_the_limit_of_busy_connections_others_are_refused() -> None:
    with Shell(max_connections=2) as server, contextlib.ExitStack() as stack:
        server.serving.check_engine = lambda: None  # pyright: ignore[reportAttributeAccessIssue]
        busy = [stack.enter_context(server.connect()) for _ in range(2)]
        for sock in busy:
            sock.sendall(post("/sleep", b"{}")[:-1])
        wait(lambda: server.serving.in_flight == 2, 5)
        refused = server.raw(b"GET /version HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert (refused.status, refused.headers["retry-after"]) == (503, "5")
        busy[0].close()
        wait(lambda: server.serving.in_flight == 1, 5)
        assert server.get("/version").status == 200


def test_ids_of_requests() -> None:
    with Shell(enable_request_id_headers=True) as server:
        assert server.get("/version", X_Request_Id="mine-7").headers["x-request-id"] == "mine-7"
        made = {
            server.get("/version", **({"X_Request_Id": sent} if sent else {})).headers["x-request-id"]
            for sent in ("", "a" * 129, "tab\there", "ümlaut")
        }
        assert len(made) == 4
        made |= {server.get("/version").headers["x-request-id"] for _ in range(300)}  # more than are drawn at once
        assert len(made) == 304
        assert all(len(name) == 32 and name.isalnum() for name in made)
        # The id of another request in flight may be used again.
        assert server.get("/nothing", X_Request_Id="mine-7").headers["x-request-id"] == "mine-7"


def test_details_of_a_fault_are_not_revealed(
    shell: Shell, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails() -> None:
        raise KeyError("/home/secret at 0x7fffdeadbeef")

    monkeypatch.setattr(shell.serving.metrics, "text", fails)
    reply = shell.get("/metrics")
    assert (reply.status, reply.error["type"]) == (500, "InternalServerError")
    assert "secret" not in reply.body.decode()
    assert "GET /metrics failed" in [record.getMessage() for record in caplog.records]
