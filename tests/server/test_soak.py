# SPDX-License-Identifier: Apache-2.0
"""Ten rounds of mixed traffic against the real server leave it unchanged, and the soak detects what it looks for.
`python -m benchmarks.soak` does the same for half an hour, with finer measurements of memory."""

import asyncio
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import soak, traffic
from benchmarks.soak import Snapshot, Soak
from benchmarks.traffic import CHAT, COMPLETIONS, Ask
from tests.server import live as living
from tests.server.live import Live

ROUNDS, REQUESTS = 10, 100
MOST_MB = 64  # that either process may grow by meanwhile; a process takes memory in pieces


@pytest.fixture(scope="module")
def warm(model: Path) -> Iterator[Live]:
    """A server that has compiled everything before it became ready. It has two rows: most requests wait."""
    with living.live(model, engine={"warmup": True, "max_num_seqs": 2, "max_num_batched_tokens": 16}) as server:
        yield server


def test_a_soak(warm: Live) -> None:
    soaked = Soak(f"http://127.0.0.1:{warm.port}", warm.process.pid, clients=12, seed=0)
    asyncio.run(soaked.run(requests=REQUESTS, enough=lambda rounds, _: rounds == ROUNDS))
    assert soaked.faults == []
    assert sum(soaked.statuses.values()) == ROUNDS * REQUESTS
    assert {status for status in soaked.statuses if status >= 500} == set()
    assert soaked.statuses[traffic.LEFT] > 50 and soaked.statuses[400] > 20
    first, last = soaked.samples[1], soaked.samples[-1]
    assert soak.verdict([first, last]) == []
    assert last.compiled_late == 0 and last.blocks == warm.engine["num_blocks"] - 1
    assert last.api_rss - first.api_rss < MOST_MB and last.engine_rss - first.engine_rss < MOST_MB
    assert warm.process.poll() is None


# --- that it would be seen ------------------------------------------------------------------------------------------


def samples(**grows: float) -> list[Snapshot]:
    """250 samples, 500 requests apart, in which the figures in `grows` increase by so much each."""
    first = Snapshot(
        requests=500,
        seconds=5.0,
        api_rss=100.0,
        engine_rss=900.0,
        api_fds=9,
        engine_fds=4,
        api_threads=8,
        engine_threads=17,
        compiled_late=0,
        blocks=96,
        preemptions=0,
    )
    steps: dict[str, Any] = {"requests": 500, "seconds": 5.0, **grows}
    return [
        replace(first, **{name: getattr(first, name) + number * step for name, step in steps.items()})
        for number in range(250)
    ]


def test_constant_figures_pass() -> None:
    assert soak.verdict(samples()) == []
    assert soak.verdict(samples(api_rss=0.04, engine_rss=-1, preemptions=3)) == []


@pytest.mark.parametrize("name", [*soak.FLAT, "api_rss", "engine_rss"])
def test_growing_figures_fail(name: str) -> None:
    [wrong] = soak.verdict(samples(**{name: 0.1 if name.endswith("rss") else 1}))
    assert name in wrong


def test_lost_blocks_fail() -> None:
    assert soak.verdict(samples(blocks=-1))


def test_memory_is_judged_by_its_trend() -> None:
    noise = random.Random(0)
    stepped = [
        replace(sample, engine_rss=900 + noise.random() + 9 * (number > 100)) for number, sample in enumerate(samples())
    ]
    assert soak.verdict(stepped) == []
    leaking = [replace(sample, api_rss=sample.api_rss + 3 * noise.random()) for sample in samples(api_rss=0.1)]
    assert soak.overall(leaking, "api_rss") == pytest.approx(2, abs=0.3)
    assert soak.steady(leaking, "api_rss") == pytest.approx(2, abs=0.8)
    assert soak.verdict(leaking)
    assert soak.verdict(leaking[:40]) == []  # too few to tell
    burst = [replace(sample, api_rss=100 + 70 * (number > 20)) for number, sample in enumerate(samples()[:40])]
    assert soak.verdict(burst)  # but this is too much


def test_rounds_can_be_repeated() -> None:
    def asked(seed: str) -> list[Ask]:
        rng = random.Random(seed)
        return [traffic.ask(rng) for _ in range(500)]

    one = asked("0 1")
    assert one == asked("0 1") and one != asked("0 2")
    assert 200 < sum(ask.body.get("max_tokens") == 1 for ask in one if isinstance(ask.body, dict)) < 300
    assert 70 < sum(ask.leaves is not None for ask in one) < 130
    assert 10 < sum(ask.status != 200 for ask in one) < 45


@pytest.mark.parametrize(
    ("asked", "status", "body", "problem"),
    [
        (Ask(COMPLETIONS, {"prompt": "a"}), 500, b"{}", "status 500, expected 200"),
        (Ask(COMPLETIONS, {"prompt": ""}, 400), 400, b'{"error": {}}', "not an error"),
        (Ask(COMPLETIONS, {"prompt": "a"}), 200, b'{"choices": []}', "not exactly one"),
        (Ask(COMPLETIONS, {"prompt": "a", "stream": True}), 200, b"", "without its final event"),
        (Ask(CHAT, {"stream": True}), 200, b'data: {"error": {}}\n\ndata: [DONE]\n\n', "an error in"),
        (Ask(CHAT, {"stream": True}), 200, b'data: {"choices": []}\n\ndata: [DONE]\n\n', "not exactly one"),
        (
            Ask(CHAT, {}),
            200,
            b'{"choices": [{"index": 0, "finish_reason": "abort"}]}',
            "was not requested",
        ),
        (
            Ask(CHAT, {"max_tokens": 1}),
            200,
            b'{"choices": [{"index": 0, "finish_reason": "stop"}], "usage": {"completion_tokens": 2}}',
            "more than the 1",
        ),
    ],
)
def test_wrong_answers_are_noticed(asked: Ask, status: int, body: bytes, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        traffic.check(asked, status, body)
