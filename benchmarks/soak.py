# SPDX-License-Identifier: Apache-2.0
"""Checks that a server stays healthy: `python -m benchmarks.soak [--minutes 30] [--json FILE] [--url URL --pid PID]`.

`jaxserve run` serves the demo model with few blocks under the traffic of traffic.py, in rounds. After each round all
clients leave, and the server must be idle: no rows, no blocks in use, no connections. Then the memory, descriptors and
threads of both its processes are recorded. Round N of a seed always asks for the same, so a failing round can be run
again.

Exits with status 1 if, after the warm-up, memory grows by more than 1 MB per 10 000 requests, descriptors or threads
increase, a program is compiled, blocks are lost, an answer is wrong, or a greedy request gives a different answer than
it gives alone. An allocator takes memory in occasional steps of up to 10 MB, while a leak grows all the time.
Therefore the verdict is on the median growth over all stretches of 2500 requests, from request 20 000 on, and on the
total growth if that is large.
"""

import argparse
import asyncio
import json
import random
import re
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np

from benchmarks import arguments, facts, traffic
from benchmarks.server import JaxserveServer
from jaxserve import demo

AIM = 1.0  # MB of memory growth for PER requests
PER = 10_000
STRETCH = 2500  # requests, within which a leak of AIM or more takes new pages from the system
MEANINGFUL = 20_000  # requests; after fewer, memory growth is not judged
MOST = 64.0  # MB of total growth after the warm-up
WARM = 0.3  # the share of the rounds that warm up
REST = 10.0  # seconds within which the server must become idle
CONFIG = {
    "model": str(demo.FOLDER),
    "max_num_seqs": 16,
    "max_num_batched_tokens": 256,
    "max_model_len": 256,
    "num_blocks": 33,  # too few for 16 rows: some requests are preempted
    "warmup": "all",  # programs that join later would take memory
}
FLAT = ("api_fds", "engine_fds", "api_threads", "engine_threads", "compiled_late", "blocks")


@dataclass(frozen=True)
class Snapshot:
    """The idle server after `requests` requests. Memory in MB."""

    requests: int
    seconds: float
    api_rss: float
    engine_rss: float
    api_fds: int
    engine_fds: int
    api_threads: int
    engine_threads: int
    compiled_late: int
    blocks: int  # in all states
    preemptions: int


class Soak:
    """A soak test of a ready server that has no other clients."""

    def __init__(self, url: str, pid: int, *, clients: int, seed: int) -> None:
        self.url, self.pid, self.clients, self.seed = url, pid, clients, seed
        self.child = child_of(pid)
        self.samples: list[Snapshot] = []
        self.faults: list[str] = []
        self.statuses: Counter[int] = Counter()
        self._began = time.monotonic()

    async def run(self, *, requests: int, enough: Callable[[int, float], bool]) -> None:
        """Runs rounds of `requests` requests until `enough(rounds, seconds)` is true."""
        async with aiohttp.ClientSession(self.url) as watch:  # a single, persistent connection
            alone = await traffic.canary(watch, stream=False)
            while not enough(len(self.samples), time.monotonic() - self._began):
                number = len(self.samples)
                rng = random.Random(f"{self.seed} {number}")
                pool = aiohttp.TCPConnector(limit=0)
                async with aiohttp.ClientSession(self.url, connector=pool) as session:
                    seen = await traffic.run(session, rng, requests=requests, clients=self.clients, alone=alone)
                self.statuses += seen.statuses
                self.faults += [f"round {number}: {fault}" for fault in seen.faults]
                self.samples.append(await self._sample(watch, (number + 1) * requests))

    async def _sample(self, watch: aiohttp.ClientSession, requests: int) -> Snapshot:
        end = time.monotonic() + REST
        while busy := unrest(metrics := await self._metrics(watch)):
            if time.monotonic() > end:
                self.faults.append(f"after {requests} requests the server does not become idle: {busy}")
                break
            await asyncio.sleep(0.05)
        for path in ("/health", "/load"):
            async with watch.get(path) as answer:
                text = await answer.text()
                if answer.status != 200 or (path == "/load" and json.loads(text) != {"server_load": 0}):
                    self.faults.append(f"after {requests} requests {path} returns {answer.status} {text}")
        api, engine = process(self.pid), process(self.child)
        return Snapshot(
            requests=requests,
            seconds=time.monotonic() - self._began,
            api_rss=api[0],
            engine_rss=engine[0],
            api_fds=api[1],
            engine_fds=engine[1],
            api_threads=api[2],
            engine_threads=engine[2],
            compiled_late=int(metrics["compiled_late_total"]),
            blocks=int(sum(metrics[f"kv_blocks {state}"] for state in ("free", "cached", "used"))),
            preemptions=int(metrics["num_preemptions_total"]),
        )

    async def _metrics(self, watch: aiohttp.ClientSession) -> dict[str, float]:
        async with watch.get("/metrics") as answer:
            return parse(await answer.text())


def parse(text: str) -> dict[str, float]:
    """The metrics that are needed: those without additional labels, and the blocks."""
    found: dict[str, float] = {}
    for name, labels, value in re.findall(r"^jaxserve:(\w+)\{(.*)\} (\S+)$", text, re.MULTILINE):
        state = re.search(r'state="(\w+)"', labels) if name == "kv_blocks" else None
        found[f"{name} {state[1]}" if state else name] = float(value)
    return found


def unrest(metrics: dict[str, float]) -> dict[str, float]:
    """The metrics that differ from those of an idle server."""
    names = ("num_requests_running", "num_requests_waiting", "kv_blocks used")
    wanted = {**dict.fromkeys(names, 0.0), "http_connections": 1.0}
    return {name: metrics[name] for name, value in wanted.items() if metrics[name] != value}


def process(pid: int) -> tuple[float, int, int]:
    """The memory in MB, file descriptors and threads of a process."""
    folder = Path(f"/proc/{pid}")
    fields = dict(line.split(":", 1) for line in (folder / "status").read_text().splitlines())
    # Only private memory, including swapped pages: pages of files come and go as other processes need memory.
    memory = sum(int(fields[name].split()[0]) for name in ("RssAnon", "VmSwap")) * 1024 / 1e6
    return memory, len(list((folder / "fd").iterdir())), int(fields["Threads"])


def child_of(pid: int) -> int:
    found: list[int] = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = stat.read_text().rpartition(")")[2].split()[1]
        except OSError:
            continue  # it has just exited
        if int(parent) == pid:
            found.append(int(stat.parent.name))
    if len(found) != 1:
        raise SystemExit(
            f"error: process {pid} has {len(found)} child processes, but a server has one: give the server's pid"
        )
    return found[0]


# --- the verdict ----------------------------------------------------------------------------------------------------


def overall(samples: Sequence[Snapshot], name: str) -> float:
    """The growth in MB for PER requests, from the first sample to the last."""
    first, last = samples[0], samples[-1]
    return PER * (getattr(last, name) - getattr(first, name)) / max(last.requests - first.requests, 1)


def steady(samples: Sequence[Snapshot], name: str) -> float:
    """As `overall`, the median over all stretches."""
    stretches = [
        [one for one in samples[place:] if one.requests <= first.requests + STRETCH]
        for place, first in enumerate(samples)
        if first.requests + STRETCH <= samples[-1].requests
    ]
    return statistics.median(overall(stretch, name) for stretch in stretches or [samples])


def after_warm_up(samples: Sequence[Snapshot]) -> Sequence[Snapshot]:
    return samples[int(len(samples) * WARM) :]


def verdict(samples: Sequence[Snapshot]) -> list[str]:
    """What is wrong with the samples, which are those after the warm-up."""
    first, last = samples[0], samples[-1]
    wrong = [
        f"{name} went from {getattr(first, name)} to {getattr(last, name)}"
        for name in FLAT
        if getattr(last, name) > getattr(first, name) or (name == "blocks" and first.blocks != last.blocks)
    ]
    if last.requests - first.requests >= MEANINGFUL:
        for name in ("api_rss", "engine_rss"):
            if steady(samples, name) > AIM:
                wrong.append(
                    f"{name} grows by {steady(samples, name):.2f} MB for {PER} requests, target at most {AIM:g}"
                )
    for name in ("api_rss", "engine_rss"):
        if getattr(last, name) - getattr(first, name) > MOST:
            wrong.append(f"{name} went from {getattr(first, name):.0f} to {getattr(last, name):.0f} MB")
    return wrong


def table(samples: Sequence[Snapshot], rows: int = 20) -> str:
    names = ("requests", "seconds", "api_rss", "engine_rss", *FLAT, "preemptions")
    lines = [" ".join(f"{name:>14}" for name in names)]
    chosen = sorted({round(place) for place in np.linspace(0, len(samples) - 1, rows)})
    for place in chosen:
        values = (getattr(samples[place], name) for name in names)
        lines.append(" ".join(f"{value:14.1f}" if isinstance(value, float) else f"{value:14}" for value in values))
    return "\n".join(lines)


def report(soak: Soak) -> dict[str, Any]:
    warm = after_warm_up(soak.samples)
    span = warm[-1].requests - warm[0].requests
    return facts.collect() | {
        "processor": facts.processor(),
        "requests": soak.samples[-1].requests,
        "requests_after_warm_up": span,
        "memory_judged": span >= MEANINGFUL,
        "mb_per_10k": {
            name: {"steady": steady(warm, name), "overall": overall(warm, name)} for name in ("api_rss", "engine_rss")
        },
        "statuses": {"left" if status == traffic.LEFT else str(status): n for status, n in soak.statuses.items()},
        "faults": soak.faults + verdict(warm),
        "samples": [asdict(sample) for sample in soak.samples],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.soak",
        description="Check that a server's memory and counters stay stable under load.",
    )
    parser.add_argument("--minutes", type=arguments.positive, default=30, help="duration (default: 30)")
    parser.add_argument("--url", help="URL of a running server without other clients; requires --pid")
    parser.add_argument("--pid", type=int, help="process id of the server on this machine")
    parser.add_argument("--clients", type=arguments.whole, default=24, help="concurrent clients")
    parser.add_argument("--round", type=arguments.whole, default=500, help="requests per round")
    parser.add_argument("--seed", type=int, default=0, help="seed of the requests (default: 0)")
    parser.add_argument(
        "--json", type=arguments.file_to_write, metavar="FILE", help="also write the observations to FILE"
    )
    options = parser.parse_args()
    if (options.url is None) != (options.pid is None):
        parser.error("--url and --pid require each other: set both or neither")
    own = JaxserveServer(CONFIG) if options.url is None else None
    try:
        url = f"http://127.0.0.1:{own.port}" if own else str(options.url)
        pid = own.process.pid if own else int(options.pid)
        soak = Soak(url, pid, clients=options.clients, seed=options.seed)

        def enough(rounds: int, seconds: float) -> bool:
            return rounds > 1 and seconds > 60 * options.minutes

        asyncio.run(soak.run(requests=options.round, enough=enough))
    finally:
        if own:
            own.close()
    found = report(soak)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    print(facts.processor())
    print(table(soak.samples))
    print(f"answers by status: {found['statuses']}")
    judged = "" if found["memory_judged"] else f", too few to judge memory growth: {MEANINGFUL} are needed"
    print(f"requests after the warm-up: {found['requests_after_warm_up']}{judged}")
    for name, growth in found["mb_per_10k"].items():
        print(f"{name}: {growth['steady']:.2f} MB for {PER} requests (median), {growth['overall']:.2f} MB (overall)")
    for fault in found["faults"][:20]:
        print(f"wrong: {fault}")
    sys.exit(bool(found["faults"]))


if __name__ == "__main__":
    main()
