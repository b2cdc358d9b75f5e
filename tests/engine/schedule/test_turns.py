# SPDX-License-Identifier: Apache-2.0
"""Tenants take turns: properties of the order in which requests get rows, over random arrivals."""

import random
from collections import Counter

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jaxserve.engine.schedule import turns
from jaxserve.errors import OverloadedError
from tests.engine.fakes import FakeEngine, limits, request
from tests.engine.made_up_model import STEMS

type Arrival = tuple[str, int]  # tenant, turns of the engine before the next arrival


def add(engine: FakeEngine, name: str, tenant: str, *, priority: int = 0, n: int = 1, max_tokens: int = 3) -> None:
    extra = dict(tenant=tenant, priority=priority)
    engine.add(request(name, [len(name), *STEMS[0][:6]], request=extra, n=n, max_tokens=max_tokens, ignore_eos=True))


def started(engine: FakeEngine, seen: list[str]) -> None:
    """A turn of the engine; adds the requests that got their first row to those seen."""
    engine.turn()
    running = [sequence.request.id for sequence in engine.scheduler.running]  # in order
    seen += [name for name in dict.fromkeys(running) if name not in seen]


def tenant_of(name: str) -> str:
    return name.partition(" ")[0]


@settings(max_examples=60)
@given(st.integers(1, 4), st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 3)), min_size=2, max_size=40))
@example(1, [("a", 0)] * 30 + [("b", 0), ("c", 0)])
def test_a_tenant_s_first_waits_for_at_most_two_of_each_other(rows: int, arrivals: list[Arrival]) -> None:
    """For one, unless the tenant has just had its turn: however many the others have waiting."""
    engine = FakeEngine(limits(max_num_seqs=rows, num_blocks=200))
    seen: list[str] = []
    waiting_before: dict[str, set[str]] = {}
    had_turns: dict[str, bool] = {}
    for number, (tenant, pause) in enumerate(arrivals):
        waiting = {name for name in engine.scheduler.requests if name not in seen}
        name = f"{tenant} {number}"
        if tenant not in map(tenant_of, waiting):
            waiting_before[name] = waiting
            had_turns[name] = tenant in map(tenant_of, seen)
        add(engine, name, tenant)
        for _ in range(pause):
            started(engine, seen)
    while engine.scheduler.unfinished:
        started(engine, seen)
    for name, waiting in waiting_before.items():
        sooner = Counter(tenant_of(other) for other in waiting & set(seen[: seen.index(name)]))
        assert max(sooner.values(), default=0) <= 1 + had_turns[name], (name, seen)


@settings(max_examples=60)
@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=40), st.integers(1, 3))
def test_tenants_that_wait_get_equally_many_rows(tenants: list[str], rows: int) -> None:
    engine = FakeEngine(limits(max_num_seqs=rows, num_blocks=200))
    for number, tenant in enumerate(tenants):
        add(engine, f"{tenant} {number}", tenant)
    seen: list[str] = []
    while engine.scheduler.unfinished:
        started(engine, seen)
    left, got = Counter(tenants), Counter[str]()
    for name in seen:
        got[tenant_of(name)] += 1
        left[tenant_of(name)] -= 1
        behind = [got[tenant] for tenant in left if left[tenant]]
        assert got[tenant_of(name)] <= min(behind, default=99) + 1
    for tenant in "abc":
        own = [int(name.split()[1]) for name in seen if tenant_of(name) == tenant]
        assert own == sorted(own), "those of one tenant come in order of arrival"


def test_a_request_counts_for_its_rows() -> None:
    engine = FakeEngine(limits(max_num_seqs=2, num_blocks=200))
    for number in range(6):
        add(engine, f"wide {number}", "wide", n=2)
        add(engine, f"one {number}", "one")
    seen: list[str] = []
    while len(seen) < 9:
        started(engine, seen)
    assert Counter(map(tenant_of, seen)) == {"one": 6, "wide": 3}
    engine.drain()


def test_priority_comes_before_fairness_and_is_fair_within() -> None:
    engine = FakeEngine(limits(max_num_seqs=1, priority=True))
    for number in range(4):
        add(engine, f"a {number}", "a", priority=1)
    for number in range(3):
        add(engine, f"b {number}", "b", priority=0)
    add(engine, "a urgent", "a", priority=0)
    seen: list[str] = []
    while engine.scheduler.unfinished:
        started(engine, seen)
    assert seen == ["b 0", "a urgent", "b 1", "b 2", "a 0", "a 1", "a 2", "a 3"]


def test_requests_that_end_before_their_turn_take_none() -> None:
    engine = FakeEngine(limits(max_num_seqs=1))
    add(engine, "a 0", "a", max_tokens=6)
    engine.turn()
    for number in range(1, 9):
        add(engine, f"a {number}", "a")
    for number in range(1, 9):
        engine.scheduler.abort(f"a {number}")
    for number in range(3):
        add(engine, f"b {number}", "b")
    add(engine, "a last", "a")
    seen = ["a 0"]
    while engine.scheduler.unfinished:
        started(engine, seen)
    assert seen == ["a 0", "b 0", "b 1", "a last", "b 2"]  # as if it were its second
    engine.check_over()


@pytest.mark.parametrize("most", [dict(max_num_queued_reqs=3), dict(max_num_queued_tokens=22)])
def test_a_full_queue_has_room_for_the_first_of_each_other_tenant(most: dict[str, int]) -> None:
    """Of any priority: another priority does not make a tenant another one."""
    engine = FakeEngine(limits(max_num_seqs=1, priority=True, **most))
    for number in range(3):
        add(engine, f"a {number}", "a", priority=number)
    for name in ("b", "c"):
        add(engine, f"{name} 0", name)
        for priority in (0, 1, -5):
            with pytest.raises(OverloadedError, match="queue full"):
                add(engine, f"{name} 1", name, priority=priority)
    for priority in range(-9, 9):
        with pytest.raises(OverloadedError, match="queue full"):
            add(engine, "a 3", "a", priority=priority)
    engine.drain()
    engine.check_over()
    add(engine, "a 4", "a")
    engine.drain()


def test_the_memory_of_turns_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Though clients choose priorities, and turns of the past are kept."""
    monkeypatch.setattr(turns, "FEW", 16)
    engine = FakeEngine(limits(max_num_seqs=1, priority=True))
    draws = random.Random(0)
    for number in range(300):
        add(engine, f"a {number}", "a", priority=draws.randrange(10**9), max_tokens=1)
        if number % 10 == 9:
            engine.drain()
    assert len(engine.scheduler._waiting.turns._shares) <= 40  # pyright: ignore[reportPrivateUsage]
