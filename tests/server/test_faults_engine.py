# SPDX-License-Identifier: Apache-2.0
"""The life cycle of the server: start, shutdown, an engine that fails, hangs or is killed.

Each test has its own server, whose engine is a fake. `started` fails if a process is left over.
"""

import http.client
import json
import os
import re
import signal
import socket
import ssl
import time
from collections.abc import Generator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.server import live as living
from tests.server.live import Live, Reply, answer, gone, post, wait
from tests.server.test_config import certificate


def asked(max_tokens: int, *, stream: bool) -> dict[str, Any]:
    """Without a tokenizer there is no text: streams are compared by their ids."""
    return {"prompt": [1, 2, 3], "max_tokens": max_tokens, "stream": stream, "return_token_ids": True}


def complete(server: Live, max_tokens: int = 4, *, stream: bool = False) -> Reply:
    return server.post("/v1/completions", asked(max_tokens, stream=stream))


def body(max_tokens: int, *, stream: bool) -> bytes:
    return post(
        "/v1/completions",
        json.dumps(asked(max_tokens, stream=stream)).encode(),
        "Connection: close",
    )


@contextmanager
def begun(server: Live, max_tokens: int = 200) -> Generator[tuple[socket.socket, socket.socket]]:
    """A running stream, and a request for a whole answer beside it."""
    with server.connect() as stream, server.connect() as whole:
        whole.sendall(body(max_tokens, stream=False))
        stream.sendall(body(max_tokens, stream=True))
        assert stream.recv(20, socket.MSG_PEEK).startswith(b"HTTP/1.1 200")
        wait(lambda: server.metrics()["jaxserve:num_requests_running"] == 2, 20)
        yield stream, whole


def check_broken(reply: Reply, *, status: int, ended: bool = False) -> None:
    """Check that an unfinished answer reports it. `ended`: because the server was shut down."""
    assert reply.status == status
    if status == 200:
        assert reply.events[-1] == "[DONE]"
        error = reply.events[-2]["error"]
    else:
        error = reply.error
    assert error["type"] == ("ServiceUnavailableError" if ended else "InternalServerError")
    assert (error["message"] == "The server shut down before this response was complete.") is ended
    assert "/" not in error["message"] and "0x" not in error["message"]


# --- starting -------------------------------------------------------------------------------------------------------


def test_health_shows_what_is_compiled_meanwhile(tmp_path: Path) -> None:
    with living.live(tmp_path, fake="pending=5") as one:
        body = {"status": "ok", "detail": "compiling 9/14 in the background", "done": 9, "total": 14}
        assert one.get("/health").json == body
        got = one.metrics()
        assert [got[f'jaxserve:programs{{state="{state}"}}'] for state in ("compiled", "pending")] == [9, 5]


def test_the_port_answers_while_the_model_loads(tmp_path: Path) -> None:
    cert, key = certificate(tmp_path)
    server = {"ssl_certfile": str(cert), "ssl_keyfile": str(key), "api_key": ["sesame-7"], "host": "0.0.0.0"}
    with living.started(tmp_path, server=server, fake="load=60") as one:
        one.wait_listening()
        trust = ssl.create_default_context(cafile=str(cert))

        def ask(method: str, path: str, **headers: str) -> Reply:
            with closing(http.client.HTTPSConnection("localhost", one.port, context=trust, timeout=10)) as connection:
                connection.request(method, path, b"{}" if method == "POST" else None, headers)
                reply = connection.getresponse()
                return Reply(reply.status, {k.lower(): v for k, v in reply.getheaders()}, reply.read())

        def loading() -> bool:
            reply = ask("GET", "/health")
            assert (reply.status, reply.json["status"]) == (503, "starting")
            return reply.json["total"] == 18

        wait(loading, 20)
        assert ask("GET", "/live").status == 200
        assert ask("POST", "/v1/completions").status == 401
        refused = ask("POST", "/v1/completions", Authorization="Bearer sesame-7")
        assert refused.status == 503 and 2 <= int(refused.headers["retry-after"]) <= 60
        assert refused.error["message"] == "The model is still loading (loading 38 %)."
        # Someone who speaks no TLS holds nothing up.
        with one.connect() as sock:
            sock.sendall(b"GET /health HTTP/1.1\r\n\r\n")
            assert living.closed(sock)
        begin = time.monotonic()
        one.signal(signal.SIGTERM)
        assert one.wait_exit(20) == 0
        assert time.monotonic() - begin < 10
        assert "sesame" not in one.log
        assert "ANYONE" not in one.log


def test_a_missing_model(tmp_path: Path) -> None:
    with living.started(tmp_path, server={"host": "0.0.0.0"}, fake="refuse") as one:
        assert one.wait_exit() == 1
        assert "Traceback" not in one.log
        last = one.log.strip().splitlines()[-1]
        assert last == "error: there is no model here  hint: give another"
        assert "ANYONE WHO REACHES 0.0.0.0" in one.log
        assert " and all other addresses of this machine, loading" in one.log


# --- ending ---------------------------------------------------------------------------------------------------------


def test_after_sigterm_it_finishes_requests_in_flight(tmp_path: Path) -> None:
    with living.live(tmp_path, fake="slow=0.03") as one, one.connect() as idle, begun(one, 60) as (sock, other):
        idle.sendall(b"GET /version HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert answer(idle).status == 200
        child = one.child()
        one.signal(signal.SIGTERM)
        wait(lambda: one.get("/health").status == 503, 1)
        assert one.get("/health").json["status"] == "draining"
        assert (one.get("/live").status, one.get("/ping").status) == (200, 503)
        refused = complete(one)
        assert (refused.status, refused.error["type"]) == (503, "ServiceUnavailableError")
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.headers["connection"] == "close"
        stream, whole = answer(sock), answer(other)
        assert stream.events[-1] == "[DONE]"
        assert "error" not in stream.events[-2]
        assert whole.json["usage"]["completion_tokens"] == 60
        assert one.wait_exit(10) == 0
        assert gone(child)
        with pytest.raises(ConnectionRefusedError):
            one.connect()
        assert "Traceback" not in one.log


def test_a_second_sigterm_ends_it_at_once(tmp_path: Path) -> None:
    with living.live(tmp_path, fake="slow=0.05") as one, begun(one) as (sock, other):
        one.signal(signal.SIGINT)
        wait(lambda: one.get("/health").status == 503, 1)
        begin = time.monotonic()
        one.signal(signal.SIGINT)
        check_broken(answer(sock), status=200, ended=True)
        check_broken(answer(other), status=503, ended=True)
        assert one.wait_exit(10) == 130
        assert time.monotonic() - begin < 5
        assert "Traceback" not in one.log


def test_requests_that_take_too_long_are_ended(tmp_path: Path) -> None:
    with living.live(tmp_path, fake="slow=0.05", server={"shutdown_timeout": 0.5}) as one, begun(one) as (sock, _):
        begin = time.monotonic()
        one.signal(signal.SIGTERM)
        check_broken(answer(sock), status=200, ended=True)
        assert 0.4 < time.monotonic() - begin < 6
        assert one.wait_exit(10) == 0


def test_a_killed_server_leaves_no_process(tmp_path: Path) -> None:
    with living.live(tmp_path, fake="slow=0.05") as one, begun(one) as (sock, _):
        child = one.child()
        one.process.kill()
        one.wait_exit(10)
        assert living.closed(sock)
        wait(lambda: gone(child), 5)


# --- an engine that fails -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["raise", "kill"])
def test_an_engine_that_fails(tmp_path: Path, fault: str) -> None:
    fake = "slow=0.05,raise=30" if fault == "raise" else "slow=0.05"
    with living.live(tmp_path, fake=fake) as one, begun(one) as (sock, other):
        if fault == "kill":
            os.kill(one.child(), signal.SIGKILL)
        check_broken(answer(sock), status=200)
        begin = time.monotonic()
        check_broken(answer(other), status=500)
        assert health(one) in (503, 0)
        [whole] = [line for line in one.log.splitlines() if "status=500" in line]
        assert re.search(r"generated_tokens=\d", whole)
        assert one.wait_exit(10) == 1
        assert time.monotonic() - begin < 5
        assert "the engine failed: " in one.log
        if fault == "kill":
            assert "SIGKILL" in one.log


def test_an_engine_that_hangs_is_started_again(tmp_path: Path) -> None:
    server = {"watchdog_timeout": 2.0, "restart_engine": True}
    with living.live(tmp_path, fake="slow=0.02,hang=12", server=server) as one:
        first = one.child()
        assert complete(one, 2).status == 200
        begin = time.monotonic()
        check_broken(complete(one, 200, stream=True), status=200)
        assert one.get("/health").status == 503
        assert one.get("/live").status == 200
        assert time.monotonic() - begin < 20
        one.wait_ready()
        assert gone(first) and one.child() != first
        assert complete(one, 2).status == 200
        metrics = one.metrics()
        assert metrics["jaxserve:engine_restarts_total"] == 1
        assert metrics["jaxserve:engine_up"] == 1
        assert "restarting the engine" in one.log
        assert "most recent call first" in one.log  # where it hung


def test_an_engine_that_fails_again_and_again(tmp_path: Path) -> None:
    with living.live(tmp_path, fake="raise=1", server={"restart_engine": True}) as one:
        for _ in range(4):
            check_broken(complete(one), status=500)
            if one.process.poll() is None:
                wait(lambda: one.process.poll() is not None or health(one) == 200, 60)
        assert one.wait_exit(10) == 1
        assert one.log.count("restarting the engine") == 3
        assert "the engine failed too often" in one.log


def health(one: Live) -> int:
    try:
        reply = one.get("/health")
    except ConnectionError:
        return 0
    assert reply.status == 200 or reply.json["status"] in ("failed", "starting")
    return reply.status
