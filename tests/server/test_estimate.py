# SPDX-License-Identifier: Apache-2.0
"""Estimates against a simulated queue, and refusals of what cannot be done in time by a server with a fake engine."""

import heapq
import re
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.engine.capacity import Limits
from jaxserve.server.estimate import Estimator, Load, shown
from jaxserve.types.metrics import STEP_TOKENS, EngineMetrics, StepClock
from jaxserve.types.request import POOLS, Request
from jaxserve.types.sampling_params import SamplingParams
from tests.server import live as living
from tests.server.fake_engine import LIMITS, FakeEngine
from tests.server.live import Live

STEP = 0.05


def request(tenant: str = "", prompt: int = 4, **params: Any) -> Request:
    return Request(id="x", tenant=tenant, prompt_token_ids=[1] * prompt, params=SamplingParams(**params))


def metrics(seconds: dict[int, float], *, waiting: int = 0) -> EngineMetrics:
    """With these durations of steps, by their number of tokens."""
    times = [seconds.get(bound, 0.0) for bound in (*STEP_TOKENS, 10**9)]
    return replace(FakeEngine({}).metrics(), step_seconds=times, waiting=waiting)


def idle(stats: EngineMetrics | None, limits: Limits = LIMITS) -> Load:
    return Load(open={}, stats=stats, limits=limits)


@given(st.integers(1, 8), st.integers(0, 60), st.integers(1, 4), st.randoms(use_true_random=False))
def test_the_wait_is_that_of_a_simulated_queue(rows: int, waiting: int, own: int, draws: Any) -> None:
    """Sequences keep their rows for 2 s, and those that run have been running for any part of it."""
    estimator = Estimator()
    for _ in range(100):
        estimator.ended(2.0)
    load = Load(open={"a": rows + waiting}, stats=metrics({}), limits=replace(LIMITS, max_num_seqs=rows))
    found = estimator.of([request("a", n=own)], load)
    free = [draws.random() * 2 for _ in range(rows)]
    heapq.heapify(free)
    for _ in range(waiting + own):
        begun = heapq.heappop(free)
        heapq.heappush(free, begun + 2)
    assert abs(found.queue - begun) <= 2 and found.compute == 0


@given(st.integers(0, 8), st.integers(1, 3))
def test_nobody_waits_for_a_free_row(running: int, n: int) -> None:
    estimator = Estimator()
    estimator.ended(5.0)
    wait = estimator.of([request(n=n)], Load(open={"a": running}, stats=metrics({}), limits=LIMITS)).queue
    assert (wait == 0) == (running + n <= LIMITS.max_num_seqs)


def test_tenants_take_turns() -> None:
    estimator = Estimator()
    estimator.ended(1.0)
    load = Load(open={"flood": 1000, "other": 4}, stats=None, limits=replace(LIMITS, max_num_seqs=4))
    waits = [estimator.of([request(tenant)], load).queue for tenant in ("flood", "new")]
    assert waits[0] > 240 and waits[1] <= 3 / 4
    load = replace(load, limits=replace(load.limits, priority=True))
    assert estimator.of([request("flood")], load).queue == 0


def test_blocks_may_be_short_though_rows_are_free() -> None:
    estimator = Estimator()
    estimator.ended(1.0)
    load = Load(open={"a": 6}, stats=metrics({}, waiting=4), limits=LIMITS)
    assert estimator.of([request()], load).queue > 0
    assert estimator.retry_after(load) == 2  # two run, and end after a second
    assert estimator.retry_after(replace(load, stats=metrics({}))) == 1


@pytest.mark.parametrize(
    ("params", "prompt", "steps"),
    [
        (dict(max_tokens=100), 4, 1),  # it may end with its first token
        (dict(max_tokens=100, ignore_eos=True), 4, 100),
        (dict(max_tokens=100, ignore_eos=True, stop="a"), 4, 1),
        (dict(max_tokens=100, ignore_eos=True, stop_token_ids=[5]), 4, 1),
        (dict(max_tokens=100, min_tokens=30), 4, 30),
        (dict(max_tokens=None, ignore_eos=True), 2000, 48),  # to the end of the context
        (dict(max_tokens=1), 2000, 1),  # its prompt may be cached
    ],
)
def test_what_a_request_computes_at_least(params: dict[str, Any], prompt: int, steps: int) -> None:
    for known in ({1: STEP}, {8: STEP, 64: 4 * STEP}):
        found = Estimator().of([request(prompt=prompt, **params)], idle(metrics(known)))
        assert found.compute == pytest.approx(steps * STEP) and found.queue == 0


def test_prompts_that_cannot_be_cached() -> None:
    stats = metrics({1: STEP, 64: 4 * STEP})
    for limits, skip in ((replace(LIMITS, enable_prefix_caching=False), None), (LIMITS, True)):
        one = request(prompt=300, max_tokens=3, min_tokens=3, skip_reading_prefix_cache=skip)
        found = Estimator().of([one], idle(stats, limits))
        assert found.compute == pytest.approx(5 * 4 * STEP + 2 * STEP)


def test_hidden_states_of_all_tokens_and_of_the_first() -> None:
    """Those of all are not cached; the first token attends to no other."""
    limits = replace(LIMITS, max_num_batched_tokens=100, max_model_len=1000)
    stats = metrics({1: 0.01, 128: 0.5})
    found: dict[str, float] = {}
    for pool in POOLS:
        for caching in (True, False):
            one = replace(request(prompt=300), embed=True, pool=pool)
            load = idle(stats, replace(limits, enable_prefix_caching=caching))
            found[f"{pool} {caching}"] = Estimator().of([one], load).compute
    chunks = pytest.approx(3 * 0.5)
    assert found == {
        **{"last True": 0.01, "last False": chunks, "first True": 0.01, "first False": 0.01},
        **{f"{pool} {caching}": chunks for pool in ("mean", "weighted_mean") for caching in (True, False)},
    }


def test_nothing_is_known_at_first() -> None:
    for stats in (None, metrics({})):
        assert Estimator().of([request(max_tokens=2000, ignore_eos=True)], idle(stats)).total == 0


def test_times_of_steps() -> None:
    """Two steps are in flight: the second takes the time after the first. One late step is soon forgotten."""
    times = StepClock()
    times.launch(10.0)
    times.launch(10.1)
    times.read(1, 14.0)
    times.read(5, 14.5)
    assert (times.seconds[0], times.seconds[1]) == (4.0, 0.5)
    for number in range(8):
        times.launch(20.0 + number)
        times.read(1, 20.5 + number)
    assert times.seconds[0] == pytest.approx(0.5, rel=0.1)


# --- a server -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    folder: Path = tmp_path_factory.mktemp("estimates")
    with living.live(folder, fake=f"slow={STEP}", server={"request_timeout": 60}) as one:
        one.post("/v1/completions", {"prompt": [5], "max_tokens": 5})
        yield one


def test_a_request_that_cannot_be_done_in_time_is_refused_at_once(server: Live) -> None:
    before = server.metrics()
    body = {"prompt": [5], "max_tokens": 200, "ignore_eos": True}
    begun = time.monotonic()
    for stream in (False, True):
        reply = server.post("/v1/completions", body | {"stream": stream}, X_Request_Timeout="2")
        assert (reply.status, reply.error["type"]) == (503, "ServiceUnavailableError")
        found = re.search(r"([\d.]+) s are left, .* at least ([\d.]+) s\. Raise", reply.error["message"])
        assert found is not None and 1 < float(found[1]) <= 2 and 200 * STEP <= float(found[2]) < 60
        assert "retry-after" not in reply.headers  # it would not be faster later
    assert time.monotonic() - begun < 2 * 200 * STEP / 2
    name = 'jaxserve:admission_rejections_total{reason="deadline"}'
    assert server.metrics()[name] == before[name] + 2
    assert server.metrics()["jaxserve:engine_steps_total"] == before["jaxserve:engine_steps_total"]


def test_a_request_that_may_be_done_in_time_is_served(server: Live) -> None:
    body = {"prompt": [5], "max_tokens": 3, "ignore_eos": True}
    assert server.post("/v1/completions", body, X_Request_Timeout="30").status == 200
    # It could end at any time.
    assert server.post("/v1/completions", {"prompt": [5], "max_tokens": 60}, X_Request_Timeout="2").status == 200


@pytest.mark.parametrize("text", ["nan", "inf", "1_0", "+5", "1e3", "0", "-1", "", "5s", ".5", "5."])
def test_a_timeout_that_is_no_decimal_number_is_refused(server: Live, text: str) -> None:
    data = living.post("/v1/completions", b'{"prompt": [5]}', f"X-Request-Timeout: {text}")
    error = server.raw(data).error
    assert (error["code"], error["param"]) == (400, "X-Request-Timeout")
    assert error["message"].endswith("Send a decimal number, such as 30 or 2.5.")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.00012, "0.0001"),
        (0.0512, "0.05"),
        (0.947, "0.95"),
        (0.96, "1"),
        (2.4999, "2.5"),
        (9.96, "10"),
        (59.7, "60"),
        (1234.5, "1234"),
    ],
)
def test_seconds_in_sentences_are_rounded(seconds: float, text: str) -> None:
    assert shown(seconds) == text


def test_the_server_s_own_timeout_counts_too(server: Live) -> None:
    body = {"prompt": [5], "max_tokens": 2000, "ignore_eos": True}
    reply = server.post("/v1/completions", body)
    assert reply.status == 503 and "s are left" in reply.error["message"]
