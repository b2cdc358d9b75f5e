# SPDX-License-Identifier: Apache-2.0
"""The scheduler's rules, one by one, over a device in plain numpy, without jax."""

import random
from collections.abc import Iterable
from typing import Any

import pytest

from jaxserve.engine.schedule.block_tables import BlockTables
from jaxserve.engine.schedule.plan import StepResult
from jaxserve.engine.schedule.scheduler import Scheduler
from jaxserve.engine.schedule.sequence import Sequence
from jaxserve.errors import OverloadedError, RequestError
from jaxserve.types.outputs import Update
from jaxserve.types.request import Span
from tests.engine.fake_oracle import Oracle
from tests.engine.fakes import FakeEngine, check_answers, limits, request
from tests.engine.made_up_model import EOS, STEMS, VOCAB


def test_a_stream_of_arrivals_starves_no_request() -> None:
    """With memory for little more than one request, requests finish nearly in order of arrival."""
    engine = FakeEngine(limits(num_blocks=12, max_num_batched_tokens=8))
    draws = random.Random(0)
    done: list[int] = []
    count = 60
    for i in range(count):
        engine.add(request(f"{i}", draws.choices(range(VOCAB), k=draws.randint(1, 28)), max_tokens=12, ignore_eos=True))
        for _ in range(8):
            done += [int(update.request_id) for update in engine.turn() if update.finish_reason]
    while engine.scheduler.unfinished:
        done += [int(update.request_id) for update in engine.turn() if update.finish_reason]
    assert engine.scheduler.preemptions > 10
    assert max(abs(place - i) for place, i in enumerate(done)) <= engine.limits.max_num_seqs


def test_a_request_without_room_costs_nothing_and_disturbs_nothing() -> None:
    """Its prefix is looked up again when there is more room or more of it is cached, and keeps its place in the order
    of reuse."""
    bounds = limits(num_blocks=30)
    tables = BlockTables(bounds)
    pool, looked_up = tables.pool, 0

    def sequence(prompt: list[int]) -> Sequence:
        return Sequence(request("x", prompt), index=0, order=(0, 0, 0, 0), limits=bounds, seed=0)

    for prompt in ([7] * 24, [8] * 9):  # six blocks, then two that were used more recently
        first = sequence([*prompt, 1])
        first.row = 0
        assert tables.begin(first, reserve=0) and tables.grow(first, len(prompt) + 1)
        first.computed = len(prompt) + 1
        tables.publish(first)
        tables.end(first)
    order = list(pool._cached)  # pyright: ignore[reportPrivateUsage]
    taken = pool.allocate(pool.available - 8 - 2)
    assert taken is not None and len(order) == 8
    find = pool.find

    def counted(keys: Iterable[bytes], group: int = 0) -> list[int]:
        nonlocal looked_up
        found = find(each := list(keys), group)
        looked_up += len(each)
        return found

    pool.find = counted
    big = sequence([*[7] * 24, *[9] * 16])  # of ten blocks six are cached, and two of the other four are free
    for _ in range(5):
        assert not tables.begin(big, reserve=1)
    assert looked_up <= 9 + 4, "the whole prefix was looked up again"
    assert not tables.begin(big, reserve=2) and list(pool._cached) == order  # pyright: ignore[reportPrivateUsage]
    pool.release(taken[:1])
    assert tables.begin(big, reserve=1), "there is room for it now"
    assert (big.computed, big.num_blocks) == (24, 6)


def test_equal_ids_with_other_content_share_no_blocks() -> None:
    """Tokens that stand for an image have the same ids for each image; what comes before them is shared."""
    prompt = [*[7] * 8, *[9] * 8, *[5] * 5]  # blocks of 4: two of text, two of an image, one of text
    spans = {"a": (8, 16, b"cat"), "b": (8, 16, b"cat"), "c": (8, 16, b"dog"), "d": (10, 16, b"cat")}
    engine = FakeEngine(limits())
    cached: dict[str, int] = {}
    for name, span in spans.items():
        engine.add(request(name, prompt, max_tokens=1, request=dict(spans=(Span(*span),))))
        [cached[name]] = [
            update.num_cached_tokens for _ in range(4) for update in engine.turn() if update.finish_reason
        ]
    assert cached == {"a": 0, "b": 20, "c": 8, "d": 8}


# --- the queue ------------------------------------------------------------------------------------------------------


def test_queue_limits() -> None:
    engine = FakeEngine(limits(max_num_seqs=1, max_num_queued_reqs=3, max_num_queued_tokens=20))
    scheduler = engine.scheduler
    engine.add(request("long", [1] * 30))  # into an empty queue any may go that fits at all
    with pytest.raises(OverloadedError, match=r"queue full \(30 of 20 prompt tokens waiting") as refused:
        scheduler.add(request("more", [1]))
    assert refused.value.status == 503
    engine.turn()
    for name in "abc":
        engine.add(request(name, [1] * 5))
    with pytest.raises(OverloadedError, match=r"queue full \(3 of 3 waiting\); .*max_num_queued_reqs"):
        scheduler.add(request("d", [1]))
    scheduler.abort("b")
    engine.add(request("d", [1]))
    engine.drain()
    engine.check_over()
    assert {name: answer.reason for (name, _), answer in engine.answers.items()}["b"] == "abort"
    assert scheduler.queued == 0 and "more" not in scheduler.requests


def test_only_what_gets_no_free_row_counts_as_waiting() -> None:
    engine = FakeEngine(limits(max_num_seqs=4, max_num_queued_reqs=2))
    for name in "abcdef":  # before any step: 4 get a row, 2 wait
        engine.add(request(name, [1, 2], max_tokens=3))
    with pytest.raises(OverloadedError, match=r"queue full \(2 of 2 waiting\)"):
        engine.scheduler.add(request("g", [1]))
    engine.turn()
    with pytest.raises(OverloadedError, match=r"queue full \(2 of 2 waiting\)"):
        engine.scheduler.add(request("g", [1]))
    engine.drain()
    engine.check_over()


def test_samples_that_will_need_a_row_count_as_if_they_had_it() -> None:
    engine = FakeEngine(limits(max_num_seqs=4, max_num_queued_reqs=1, max_num_batched_tokens=4))
    engine.add(request("three", [1] * 9, n=3, max_tokens=3))
    engine.turn()  # one of them has a row until the prompt is complete
    engine.add(request("a", [1]))
    engine.add(request("waits", [1]))
    with pytest.raises(OverloadedError, match=r"1 of 1 waiting"):
        engine.scheduler.add(request("b", [1]))
    engine.drain()
    engine.check_over()


def test_rows_are_not_free_for_requests_that_wait_for_blocks() -> None:
    engine = FakeEngine(limits(max_num_seqs=8, num_blocks=5, max_num_queued_reqs=1))
    engine.add(request("long", list(range(1, 12)), max_tokens=4))
    engine.turn()
    engine.add(request("a", list(range(20, 31)), max_tokens=4))
    engine.turn()
    assert engine.scheduler.queued == 1
    with pytest.raises(OverloadedError, match=r"1 of 1 waiting"):
        engine.scheduler.add(request("b", [1]))
    engine.drain()
    engine.check_over()


def test_an_id_in_flight_is_rejected_and_free_after_its_end() -> None:
    engine = FakeEngine(limits())
    engine.add(request("a", [1, 2]))
    with pytest.raises(RequestError, match="'a' is already in flight"):
        engine.scheduler.add(request("a", [5]))
    engine.turn()
    engine.scheduler.abort("a")
    engine.scheduler.add(request("a", [5], max_tokens=1))  # the step in flight is of the one before
    reported = [update for _ in range(4) for update in engine.scheduler.take_ended() + engine.turn()]
    assert [update.finish_reason for update in reported] == ["abort", "length"]


def test_deadlines_end_requests_wherever_they_are() -> None:
    engine = FakeEngine(limits(max_num_seqs=1, max_num_batched_tokens=4))
    for name, deadline in (("running", 5.0), ("waiting", 5.0), ("later", 6.0), ("none", None), ("gone", 5.5)):
        engine.add(request(name, [1] * 6, n=1, max_tokens=30, ignore_eos=True, request=dict(deadline=deadline)))
    engine.scheduler.abort("gone")
    for _ in range(4):
        engine.turn()
    engine.now = 4.9
    assert not [update for update in engine.turn() if update.finish_reason]
    engine.now = 5.0
    ended = {u.request_id: (u.finish_reason, u.error) for u in engine.turn() + engine.turn() if u.finish_reason}
    assert ended == dict.fromkeys(["running", "waiting"], ("abort", "the deadline has passed"))
    engine.now = 7.0
    engine.drain()
    reasons = {name: answer.reason for (name, _), answer in engine.answers.items()}
    assert reasons == dict(running="abort", waiting="abort", later="abort", none="length", gone="abort")
    engine.check_over()


def test_deadlines_that_never_come_are_not_kept() -> None:
    engine = FakeEngine(limits())
    for i in range(50):
        engine.add(request(f"{i}", [i % VOCAB], max_tokens=1, request=dict(deadline=1e9 - i)))
        engine.drain()
    engine.check_over()


def test_a_fault_ends_all_requests_and_leaves_nothing() -> None:
    engine = FakeEngine(limits(max_num_seqs=2))
    for name in "abc":
        engine.add(request(name, [1, 2, 3], n=2))
    for _ in range(3):
        engine.turn()
    engine.scheduler.running[0].blocks[0].append(17)  # as if the scheduler itself had failed half way
    ended = engine.scheduler.abort_all("it broke")
    assert sorted((u.request_id, u.index) for u in ended) == [(name, i) for name in "abc" for i in range(2)]
    assert {(u.finish_reason, u.error) for u in ended} == {("error", "it broke")}
    plan, handle = engine.in_flight.popleft()
    assert engine.scheduler.commit(plan, engine.device.read(handle)) == []
    engine.check_over()


# --- what is counted ------------------------------------------------------------------------------------------------


def test_prompt_tokens_looked_up_and_found() -> None:
    engine = FakeEngine(limits())
    for name, shared, tail, params in (
        ("first", 12, [1], dict(n=2)),  # samples look up their prompt together
        ("again", 12, [2, 3], {}),
        ("not looking", 12, [4], dict(skip_reading_prefix_cache=True)),
        ("embedded", 12, [5], dict(n=1)),
        ("mean", 12, [6], dict(n=1)),  # not looked up: all its tokens are computed
    ):
        pool = "mean" if name == "mean" else "last"
        made = dict(embed=name in ("embedded", "mean"), pool=pool)
        engine.add(request(name, STEMS[0][:shared] + tail, request=made, **params))
        engine.drain()
    assert (engine.scheduler.prefix_queries, engine.scheduler.prefix_hits) == (13 + 14 + 13, 0 + 12 + 12)
    off = FakeEngine(limits(enable_prefix_caching=False))
    off.add(request("a", [1, 2, 3]))
    off.drain()
    assert (off.scheduler.prefix_queries, off.scheduler.prefix_hits) == (0, 0)


def test_recomputed_tokens_are_not_looked_up_again() -> None:
    engine = FakeEngine(limits(num_blocks=11))
    for i in range(4):
        engine.add(request(f"{i}", [i] * 8, max_tokens=20, ignore_eos=True))
    engine.drain()
    assert engine.scheduler.preemptions and engine.scheduler.prefix_queries == 4 * 8


# --- results ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", [0, 2])
def test_scores_are_complete_if_the_sample_that_reported_them_is_aborted(index: int) -> None:
    """Abort after the fork, while the step that scores the end of the prompt is in flight."""
    engine = FakeEngine(limits(max_num_batched_tokens=8))
    made = request("a", STEMS[0][:12], n=3, prompt_logprobs=1)
    engine.add(made)
    engine.turn()
    engine.turn()
    assert len(engine.scheduler.running) == 3
    engine.scheduler.abort("a", index=index)
    engine.drain()
    check_answers(engine, made, {("a", index)})
    engine.check_over()


def test_logits_that_are_not_finite_end_only_their_row() -> None:
    engine = FakeEngine(limits())
    engine.device.broken = {39}
    prompts = {"good": [1, 2, 3, 4, 5], "bad": [1, 2, 3, 4, 39, 6, 7, 8]}
    for name, prompt in prompts.items():
        engine.add(request(name, prompt, max_tokens=3, stop_token_ids=[39]))
    engine.drain()
    assert engine.answers["bad", 0].reason == "error" and "not finite" in (engine.answers["bad", 0].error or "")
    good = Oracle(engine.limits).answer(request("good", prompts["good"], max_tokens=3, stop_token_ids=[39]), 0)
    assert engine.answers["good", 0].tokens == good.tokens
    engine.device.broken = set()
    engine.add(request("again", prompts["bad"]))
    engine.turn()
    assert engine.plans[-1].slices[0].start == 0  # nothing that the broken one had is trusted, its first block neither
    engine.drain()
    engine.check_over()


@pytest.mark.parametrize(
    ("params", "reason", "stop_reason"),
    [
        (dict(), "stop", None),
        (dict(stop_token_ids=[EOS]), "stop", None),
        (dict(stop_token_ids=[7]), "stop", 7),
        (dict(stop_token_ids=[EOS], ignore_eos=True), "stop", EOS),
        (dict(ignore_eos=True), "length", None),
        (dict(min_tokens=2), "length", None),  # nor does a stop count before, should one be sampled for all that
        (dict(max_tokens=1, ignore_eos=True), "length", None),
    ],
)
def test_finish_reasons(params: dict[str, Any], reason: str, stop_reason: int | None) -> None:
    scheduler = Scheduler(limits(max_model_len=5), score_rows=1)
    asked: dict[str, Any] = dict(max_tokens=9) | params
    scheduler.add(request("a", [1, 2, 3], **asked))
    ended: list[Update] = []
    for token in (7 if stop_reason == 7 else EOS, 9):
        if plan := scheduler.schedule():
            ended += [update for update in scheduler.commit(plan, StepResult([token], [True])) if update.finish_reason]
    assert [(update.finish_reason, update.stop_reason) for update in ended] == [(reason, stop_reason)]


def test_predictable_ends_waste_no_step() -> None:
    engine = FakeEngine(limits(), depth=2)
    engine.add(request("a", [1, 2, 3], max_tokens=5, ignore_eos=True))
    engine.drain()
    assert [plan.tokens for plan in engine.plans] == [3, 1, 1, 1, 1]


def test_kv_memory_is_at_most_four_percent_above_the_tokens_held() -> None:
    """With blocks of 16, lengths like those of chats, and nothing shared."""
    draws = random.Random(0)
    scheduler = Scheduler(
        limits(
            vocab_size=1000,
            max_model_len=2048,
            max_num_seqs=64,
            max_num_batched_tokens=512,
            block_size=16,
            num_blocks=1500,
        ),
        score_rows=64,
    )
    for i in range(200):
        prompt = draws.choices(range(1000), k=min(1500, int(draws.lognormvariate(5.5, 0.9)) + 1))
        answer = min(500, int(draws.lognormvariate(4.8, 0.7)) + 1)
        scheduler.add(request(f"{i}", prompt, max_tokens=answer, ignore_eos=True))
    ratios: list[float] = []
    while (plan := scheduler.schedule()) is not None:
        held = sum(sequence.computed for sequence in scheduler.running)
        if len(scheduler.running) > 32:
            ratios.append(16 * scheduler.pool.counts()[2] / held)
        scheduler.commit(plan, StepResult(draws.choices(range(1000), k=plan.entries), [True] * plan.entries))
    assert len(ratios) > 300 and 1 < max(ratios) <= 1.04


# --- beams ----------------------------------------------------------------------------------------------------------


def test_a_held_beam_waits_for_its_next_token() -> None:
    """Sampled tokens of a held sequence are never fed to it."""
    engine = FakeEngine(limits(), depth=2)
    engine.add(request("a", [1, 2, 3], temperature=0, logprobs=1), hold=2)
    [sequence] = engine.sequences()
    for _ in range(5):
        engine.turn()
    assert len(engine.plans) == 1 and sequence.tokens == [1, 2, 3]
    engine.scheduler.extend(sequence, 9)
    twin = engine.scheduler.branch(sequence, 1)
    with pytest.raises(RuntimeError, match="already has sample 1"):
        engine.scheduler.branch(sequence, 1)
    assert twin.blocks == sequence.blocks
    engine.scheduler.extend(twin, 10)
    engine.turn()
    assert len(engine.plans[-1].copies) == 1 and engine.plans[-1].tokens == 3
