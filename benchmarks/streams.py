# SPDX-License-Identifier: Apache-2.0
"""Reads many event streams in one thread at the lowest possible cost: raw sockets, no parsing.

The server under test runs on the same machine; with few cores, a load generator that parses would starve it.
"""

import json
import selectors
import socket
import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

DONE = b"data: [DONE]"


class _Stream:
    def __init__(self, end: socket.socket) -> None:
        self.end = end
        self.times: list[float] = []  # when data with events arrived
        self.tail = b""
        self.head: bytes | None = None


def run(port: int, bodies: Sequence[dict[str, Any]], *, path: str = "/v1/completions") -> dict[str, Any]:
    """Sends all requests at once and reads the streams to their ends. Returns the seconds, and each stream's times."""
    with ExitStack() as opened:
        streams = [_Stream(opened.enter_context(socket.create_connection(("127.0.0.1", port)))) for _ in bodies]
        selector = opened.enter_context(selectors.DefaultSelector())
        for stream in streams:
            stream.end.setblocking(False)
            selector.register(stream.end, selectors.EVENT_READ, stream)
        requests = [_request(path, body) for body in bodies]
        began = time.perf_counter()
        for stream, request in zip(streams, requests, strict=True):
            stream.end.setblocking(True)
            stream.end.sendall(request)
            stream.end.setblocking(False)
        left = len(streams)
        while left:
            for key, _ in selector.select():
                if _read(key.data, time.perf_counter() - began):
                    selector.unregister(key.fileobj)
                    key.data.end.close()
                    left -= 1
        seconds = time.perf_counter() - began
    return {"seconds": seconds, "times": [stream.times for stream in streams]}


def _request(path: str, body: dict[str, Any]) -> bytes:
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(data)}"
    return head.encode() + b"\r\nConnection: close\r\n\r\n" + data


def _read(stream: _Stream, now: float) -> bool:
    """Reads what has arrived; returns whether the stream has ended."""
    try:
        data = stream.end.recv(1 << 16)
    except BlockingIOError:
        return False
    if stream.head is None:
        stream.head = data[:200]
        if not data.startswith(b"HTTP/1.1 200"):
            raise SystemExit(f"error: the server answered {data[:500]!r}")
    if b"data: {" in data:
        stream.times.append(now)
    ended = DONE in stream.tail + data
    stream.tail = data[-len(DONE) :]
    if not data and not ended:
        raise SystemExit("error: a stream ended early")
    return ended
