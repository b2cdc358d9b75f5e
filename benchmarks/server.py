# SPDX-License-Identifier: Apache-2.0
"""Measures what the server costs: `python -m benchmarks.server [--json FILE] [--streams 1,32,256]`.

The demo model runs in a bare engine and behind `jaxserve run` with the same settings; both stay up and take turns. In
each round every stream asks for the same number of tokens, all streams at once; the server's clients read event streams
from raw sockets in one thread. The results are medians over the rounds: the share of the engine's output tokens per
second that the server keeps, and how much later the first token and each following token arrive, at p50 and p99. On a
machine with few cores, engine, server and clients share them and XLA alone would use them all, so the ratio shows the
loss there, not on a server with idle cores. Target: 0.8 at 256 streams.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import sysconfig
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import arguments, facts, streams
from jaxserve import demo
from jaxserve.frontend.process import MALLOC  # used for both

AIM, AIM_STREAMS = 0.80, 256
QUIET = ("--disable-log-stats", "--log-level=warning")
_ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class OverheadResult:
    streams: int
    engine: float  # output tokens per second
    server: float
    kept: float  # share of the engine's speed, median of the rounds' ratios
    first_p50_ms: float  # time to the first token, the server's
    first_p99_ms: float
    added_first_p50_ms: float  # above the engine's
    added_first_p99_ms: float
    added_gap_p50_ms: float  # of the times between tokens
    added_gap_p99_ms: float


def settings(folder: Path, count: int, length: int) -> dict[str, Any]:
    return {
        "model": str(folder),
        "max_num_seqs": count,
        "max_num_batched_tokens": max(512, count),
        "max_model_len": length,
        "num_blocks": 1 + count * -(-length // 16) + 64,
        "warmup": "all",  # so that no compiler runs beside the measurement
    }


class JaxserveServer:
    """A `jaxserve run` on a free port that is ready."""

    def __init__(self, config: dict[str, Any]) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        flags = [f"--{name.replace('_', '-')}={value}" for name, value in config.items()]
        command = [Path(sysconfig.get_path("scripts"), "jaxserve"), "run", *flags, f"--port={self.port}", *QUIET]
        self.process = subprocess.Popen(command, cwd=_ROOT)
        while not self._healthy():
            if self.process.poll() is not None:
                raise SystemExit("error: the server ended; see its output")
            time.sleep(0.2)

    def _healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5) as answer:
                return answer.status == 200
        except (OSError, urllib.error.URLError):
            return False

    def run(self, prompts: list[list[int]], new: int) -> dict[str, Any]:
        # Special tokens are shown, because tokens without text cause no event.
        fixed = {"max_tokens": new, "temperature": 0, "ignore_eos": True, "stream": True, "skip_special_tokens": False}
        return streams.run(self.port, [{"prompt": ids, **fixed} for ids in prompts])

    def close(self) -> None:
        self.process.terminate()
        self.process.wait()


class BareEngine:
    """The engine without a server."""

    def __init__(self, config: dict[str, Any]) -> None:
        command = [sys.executable, "-m", "benchmarks.peers.jaxserve_engine", json.dumps(config)]
        self.process = subprocess.Popen(
            command, cwd=_ROOT, env=MALLOC | os.environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._line()

    def run(self, prompts: list[list[int]], new: int) -> dict[str, Any]:
        assert self.process.stdin
        self.process.stdin.write(json.dumps({"prompts": prompts, "max_tokens": new}) + "\n")
        self.process.stdin.flush()
        return self._line()

    def _line(self) -> dict[str, Any]:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("error: the engine ended; see its output")
        return json.loads(line)

    def close(self) -> None:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()


def measure(
    alone: Any, server: Any, *, counts: Sequence[int], prompt: int, new: int, rounds: int
) -> list[OverheadResult]:
    answers: dict[int, list[tuple[dict[str, Any], dict[str, Any]]]] = {count: [] for count in counts}
    rng = np.random.default_rng(0)
    for turn in range(rounds + 1):
        for count in counts:
            prompts = rng.integers(20, 500, (2, count, prompt)).tolist()  # different prompts for the two sides
            pair = alone.run(prompts[0], new), server.run(prompts[1], new)
            if turn:  # the first warms up
                answers[count].append(pair)
    return [_row(count, new, answers[count]) for count in counts]


def _row(count: int, new: int, pairs: Sequence[tuple[dict[str, Any], dict[str, Any]]]) -> OverheadResult:
    speeds = [(count * new / alone["seconds"], count * new / server["seconds"]) for alone, server in pairs]
    first = [
        _quantiles([times[0] for answer in side for times in answer["times"]]) for side in zip(*pairs, strict=True)
    ]
    gaps = [
        _quantiles([gap for answer in side for times in answer["times"] for gap in np.diff(times)])
        for side in zip(*pairs, strict=True)
    ]
    return OverheadResult(
        streams=count,
        engine=statistics.median(alone for alone, _ in speeds),
        server=statistics.median(server for _, server in speeds),
        kept=statistics.median(server / alone for alone, server in speeds),
        first_p50_ms=first[1][0],
        first_p99_ms=first[1][1],
        added_first_p50_ms=first[1][0] - first[0][0],
        added_first_p99_ms=first[1][1] - first[0][1],
        added_gap_p50_ms=gaps[1][0] - gaps[0][0],
        added_gap_p99_ms=gaps[1][1] - gaps[0][1],
    )


def _quantiles(seconds: Sequence[float]) -> tuple[float, float]:
    """p50 and p99, in milliseconds."""
    p50, p99 = np.quantile(np.asarray(seconds), (0.5, 0.99)) * 1e3
    return float(p50), float(p99)


def table(rows: Sequence[OverheadResult]) -> str:
    lines = [
        f"{'streams':>8} {'engine tok/s':>13} {'server tok/s':>13} {'kept':>6} {'TTFT p50':>9} {'p99':>8} "
        f"{'added TTFT p50':>15} {'p99':>7} {'added gap p50':>14} {'p99':>7}  (ms)"
    ]
    for row in rows:
        lines.append(
            f"{row.streams:8} {row.engine:13.0f} {row.server:13.0f} {row.kept:6.2f} {row.first_p50_ms:9.1f} "
            f"{row.first_p99_ms:8.1f} {row.added_first_p50_ms:15.1f} {row.added_first_p99_ms:7.1f} "
            f"{row.added_gap_p50_ms:14.1f} {row.added_gap_p99_ms:7.1f}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.server", description="Measure the overhead of the server."
    )
    parser.add_argument("--streams", default="1,32,256", help="numbers of concurrent streams")
    parser.add_argument("--prompt", type=arguments.whole, default=32, help="tokens in a prompt")
    parser.add_argument("--new", type=arguments.whole, default=128, help="tokens per stream")
    parser.add_argument("--rounds", type=arguments.whole, default=5, help="timed rounds (default: 5)")
    parser.add_argument("--json", type=arguments.file_to_write, metavar="FILE", help="also write the rows to FILE")
    options = parser.parse_args()
    counts = [int(count) for count in options.streams.split(",")]
    config = settings(demo.FOLDER, max(counts), options.prompt + options.new)
    alone = BareEngine(config)
    server = JaxserveServer(config)
    try:
        rows = measure(alone, server, counts=counts, prompt=options.prompt, new=options.new, rounds=options.rounds)
    finally:
        server.close()
        alone.close()
    print(facts.processor())
    print(table(rows))
    for row in rows:
        if row.streams == AIM_STREAMS:
            print(f"target at {AIM_STREAMS} streams: {AIM} of the engine's tokens per second; kept {row.kept:.2f}")
    if options.json:
        content = facts.collect() | {"processor": facts.processor(), "rounds": options.rounds, "prompt": options.prompt}
        content |= {"new": options.new, "rows": [asdict(row) for row in rows]}
        options.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
