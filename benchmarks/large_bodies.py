# SPDX-License-Identifier: Apache-2.0
"""What large bodies do to a running stream: `python -m benchmarks.large_bodies [--seconds 10] [--json FILE]`.

`jaxserve run` serves the demo model, with as many rows as streams. One client reads a stream of tokens and notes when
each arrives; clients in another process send large bodies meanwhile, each the next as soon as the last is answered.
Prints the gaps between the stream's tokens for each kind of body, and with no other client. On a machine with few cores
the clients, the server and the engine share them, so the figures contain what that costs. Target: no gap of 60 ms or
more.
"""

import argparse
import json
import multiprocessing
import random
import socket
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks import arguments, facts
from benchmarks.server import JaxserveServer
from jaxserve import demo
from jaxserve.cli.bench_serve import WORDS

AIM_MS = 60
MEGABYTE = 2**20
NEW = 2000  # tokens of each of its streams, one after the other
ROWS = 2
CONFIG: dict[str, Any] = {"model": str(demo.FOLDER), "max_num_seqs": ROWS, "warmup": "all"}


@dataclass(frozen=True)
class BodyKind:
    """A kind of large body, and how many clients send it."""

    name: str
    clients: int
    path: str
    body: Callable[[], dict[str, Any]]


def _text() -> str:
    return " ".join(random.Random(0).choices(WORDS.split(), k=MEGABYTE // 2))[:MEGABYTE]


def _many_keys() -> dict[str, Any]:
    return {"prompt": "a", "max_tokens": 1} | {f"key_{place}": 1 for place in range(100_000)}


KINDS = (
    BodyKind("1 MB of text to /tokenize", 8, "/tokenize", lambda: {"prompt": _text()}),
    BodyKind("1 MB of text to /v1/completions", 8, "/v1/completions", lambda: {"prompt": _text(), "max_tokens": 1}),
    BodyKind(
        "1 MB of text to /v1/chat/completions",
        8,
        "/v1/chat/completions",
        lambda: {"messages": [{"role": "user", "content": _text()}], "max_tokens": 1},
    ),
    BodyKind("100,000 unknown keys to /v1/completions", 4, "/v1/completions", _many_keys),
)


@dataclass(frozen=True)
class GapResult:
    bodies: str
    clients: int
    answers: int  # to the large bodies
    tokens: int
    p50_ms: float
    p99_ms: float
    largest_ms: float


def _clients(port: int, path: str, body: bytes, counts: Any) -> None:
    """Clients that keep sending one body, each time on a new connection. Runs until the process is killed."""
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nConnection: close\r\n"
    message = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
    with ThreadPoolExecutor(len(counts)) as threads:
        list(threads.map(lambda place: _send(port, message, counts, place), range(len(counts))))


def _send(port: int, message: bytes, counts: Any, place: int) -> None:
    while True:
        with suppress(OSError), socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(message)
            while connection.recv(MEGABYTE):
                pass
            counts[place] += 1


def _gaps(port: int, until: float, new: int) -> list[float]:
    """The times between the tokens of one stream after the other, in milliseconds."""
    body = json.dumps({"prompt": "once", "max_tokens": new, "ignore_eos": True, "stream": True}).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nConnection: close\r\n"
    gaps: list[float] = []
    while time.perf_counter() < until or not gaps:
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            first = connection.recv(2**16)
            if not first.startswith(b"HTTP/1.1 200 "):
                raise SystemExit(f"error: the server refuses the stream: {first.decode(errors='replace')}")
            last = 0.0
            while (last < until or not gaps) and b"data: " in connection.recv(2**16):
                now = time.perf_counter()
                if last:
                    gaps.append(1000 * (now - last))
                last = now
    return gaps


def measure(port: int, kind: BodyKind | None, seconds: float, *, new: int = NEW) -> GapResult:
    clients = kind.clients if kind else 0
    spawn = multiprocessing.get_context("spawn")
    counts = spawn.Array("q", clients, lock=False)
    body = json.dumps(kind.body()).encode() if kind else b""
    path = kind.path if kind else ""
    senders = spawn.Process(target=_clients, args=(port, path, body, counts), daemon=True)
    try:
        if clients:
            senders.start()
        while not all(counts):
            time.sleep(0.05)
        before, end = sum(counts), time.perf_counter() + seconds
        gaps = sorted(_gaps(port, end, new))
        answers = sum(counts) - before
    finally:
        if clients:
            senders.kill()
            senders.join()
    name = kind.name if kind else "none"
    return GapResult(name, clients, answers, len(gaps), gaps[len(gaps) // 2], gaps[int(len(gaps) * 0.99)], gaps[-1])


def report(results: Sequence[GapResult]) -> str:
    lines = ["| large bodies | clients | answers | tokens | gap p50 ms | p99 ms | largest ms |", "|---|" + "---:|" * 6]
    for each in results:
        lines.append(
            f"| {each.bodies} | {each.clients} | {each.answers} | {each.tokens} | {each.p50_ms:.1f} | "
            f"{each.p99_ms:.1f} | {each.largest_ms:.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.large_bodies", description="Measure a stream's gaps while clients send large bodies."
    )
    parser.add_argument("--seconds", type=arguments.positive, default=10, help="duration of each part (default: 10)")
    parser.add_argument("--json", type=arguments.file_to_write, metavar="FILE", help="also write the result to FILE")
    options = parser.parse_args()
    length = json.loads((demo.FOLDER / "config.json").read_text())["max_position_embeddings"]
    server = JaxserveServer(CONFIG | {"max_model_len": length})
    try:
        results = [measure(server.port, kind, options.seconds) for kind in (None, *KINDS)]
    finally:
        server.close()
    print(facts.processor())
    print(report(results))
    if options.json:
        rows = [asdict(each) for each in results]
        content = facts.collect() | {"processor": facts.processor(), "aim_ms": AIM_MS, "rows": rows}
        options.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
