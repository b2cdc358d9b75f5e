# SPDX-License-Identifier: Apache-2.0
"""The server benchmark's own parts: its table from fakes, and its client against a socket that sends given bytes."""

import socket
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import pytest

from benchmarks import server, streams

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"


class Fake:
    """A side whose first tokens come after `first` seconds and all others `gap` apart."""

    def __init__(self, first: float, gap: float) -> None:
        self.first, self.gap = first, gap
        self.asked: list[list[list[int]]] = []

    def run(self, prompts: list[list[int]], new: int) -> dict[str, Any]:
        self.asked.append(prompts)
        times = [self.first + self.gap * place for place in range(new)]
        return {"seconds": times[-1], "times": [times for _ in prompts]}


def test_rows_compare_the_server_with_the_engine() -> None:
    alone, behind = Fake(0.1, 0.1), Fake(0.2, 0.12)
    rows = server.measure(alone, behind, counts=[1, 4], prompt=8, new=11, rounds=3)
    for row, count in zip(rows, (1, 4), strict=True):
        assert row.streams == count
        assert row.engine == pytest.approx(count * 11 / 1.1) and row.server == pytest.approx(count * 11 / 1.4)
        assert row.kept == pytest.approx(1.1 / 1.4)
        assert row.first_p50_ms == pytest.approx(200) and row.added_first_p99_ms == pytest.approx(100)
        assert row.added_gap_p50_ms == pytest.approx(20) and row.added_gap_p99_ms == pytest.approx(20)
    assert "0.79" in server.table(rows)


def test_no_prompt_is_asked_twice() -> None:
    alone, behind = Fake(0.1, 0.1), Fake(0.1, 0.1)
    server.measure(alone, behind, counts=[2], prompt=8, new=2, rounds=2)
    prompts = [tuple(prompt) for side in (alone, behind) for asked in side.asked for prompt in asked]
    assert len(prompts) == len(set(prompts)) == 12  # two sides, two rounds and a warm-up, two streams


@contextmanager
def saying(*parts: bytes) -> Generator[int]:
    """A server that reads one request and then says these, with pauses between them."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            end, _ = listener.accept()
            with end:
                seen = b""
                while not seen.endswith(b"}"):
                    seen += end.recv(1 << 16)
                for part in parts:
                    end.sendall(part)
                    time.sleep(0.02)

        thread = threading.Thread(target=serve)
        thread.start()
        yield listener.getsockname()[1]
        thread.join()


def test_the_client_notes_when_there_was_news() -> None:
    with saying(HEAD, b'data: {"a": 1}\n\n', b'data: {"a": 2}\n\n', b"data: [DO", b"NE]\n\n") as port:
        answer = streams.run(port, [{"prompt": [1]}])
    [times] = answer["times"]
    assert len(times) == 2 and 0 < times[0] < times[1] < answer["seconds"]


@pytest.mark.parametrize(
    ("parts", "problem"),
    [((b"HTTP/1.1 503 Service Unavailable\r\n\r\n",), "503"), ((HEAD, b'data: {"a": 1}\n\n'), "ended early")],
)
def test_the_client_takes_no_half_answer(parts: tuple[bytes, ...], problem: str) -> None:
    with saying(*parts) as port, pytest.raises(SystemExit, match=problem):
        streams.run(port, [{"prompt": [1]}])
