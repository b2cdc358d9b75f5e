# SPDX-License-Identifier: Apache-2.0
"""The scheduler's rules on blocks: room, shared prefixes, windows, salts."""

from typing import Any

import pytest

from jaxserve.engine.schedule.sequence import Status
from tests.engine.fake_oracle import Oracle
from tests.engine.fakes import FakeEngine, check_answers, limits, request
from tests.engine.made_up_model import STEMS, VOCAB


def test_a_prompt_waits_until_all_of_it_fits_beside_what_others_still_need() -> None:
    engine = FakeEngine(limits(num_blocks=16), score_rows=2)
    engine.add(request("a", STEMS[0][:36], prompt_logprobs=0))  # 9 of 15 blocks, of which it takes one every other step
    engine.add(request("b", STEMS[1][:24]))
    for turn in range(17):
        engine.turn()
        assert [s.request.id for s in engine.scheduler.running] == ["a"], turn
    engine.drain()
    assert engine.scheduler.preemptions == 0
    engine.check_over()


def test_a_prompt_preempted_while_it_is_scored_is_scored_whole() -> None:
    engine = FakeEngine(limits(num_blocks=12, enable_prefix_caching=False), score_rows=1)
    made = request("b", STEMS[1][:24], prompt_logprobs=1, max_tokens=2)
    engine.add(request("a", STEMS[0][:4], max_tokens=32, ignore_eos=True))
    engine.add(made)
    engine.drain()
    assert engine.scheduler.preemptions
    check_answers(engine, made, set())
    slices = [s for plan in engine.plans for s in plan.slices if s.sequence.request is made and s.count > 1]
    assert slices[0].start == 0 and slices[0].score_to  # scores reported already are not computed again


def test_priority_takes_precedence_over_arrival_and_is_preempted_last() -> None:
    engine = FakeEngine(limits(num_blocks=12, priority=True, max_num_seqs=2, max_num_batched_tokens=32))
    for name, priority in (("low", 5), ("middle", 1), ("high", -3)):
        engine.add(
            request(name, [priority % VOCAB] * 16, max_tokens=20, ignore_eos=True, request=dict(priority=priority))
        )
    ends: list[str] = []
    while engine.scheduler.unfinished:
        ends += [update.request_id for update in engine.turn() if update.finish_reason]
    assert ends == ["high", "middle", "low"] and engine.scheduler.preemptions


def test_a_prefix_needs_only_the_last_window_of_layers_that_see_no_more() -> None:
    """The group with a window frees its early blocks; they are used again, yet the prefix is found."""
    engine = FakeEngine(limits(windows=(None, 6), max_num_batched_tokens=8, num_blocks=40))
    engine.add(request("a", STEMS[0][:30], max_tokens=2))
    engine.drain()
    pool = engine.scheduler.pool
    early = [block for key, block in list(pool._block_of[1].items())[:4]]  # pyright: ignore[reportPrivateUsage]
    pool.forget(early)
    engine.add(request("b", STEMS[0][:30], max_tokens=2))
    engine.drain()
    assert engine.scheduler.prefix_hits == 28
    check_answers(engine, request("b", STEMS[0][:30], max_tokens=2), set())
    # A block in the window of the next token is missed: the prefix ends before it, where its own window is complete.
    pool.forget([list(pool._block_of[1].values())[-1]])  # pyright: ignore[reportPrivateUsage]
    engine.add(request("c", STEMS[0][:30], max_tokens=2))
    engine.drain()
    assert engine.scheduler.prefix_hits == 28 + 24
    check_answers(engine, request("c", STEMS[0][:30], max_tokens=2), set())


def test_a_group_that_lost_a_long_prefix_is_searched_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its blocks are looked at one after the other, not a window for each."""
    engine = FakeEngine(limits(windows=(None, 6), max_model_len=2048, num_blocks=2000, max_num_batched_tokens=512))
    text = STEMS[0] * 50
    engine.add(request("a", text, max_tokens=2))
    engine.drain()
    pool, tables = engine.scheduler.pool, engine.scheduler._tables  # pyright: ignore[reportPrivateUsage]
    pool.forget(list(pool._block_of[1].values()))  # pyright: ignore[reportPrivateUsage]
    gaps, missed = 0, tables._gap  # pyright: ignore[reportPrivateUsage]

    def counted(*args: Any) -> Any:
        nonlocal gaps
        gaps += 1
        return missed(*args)

    monkeypatch.setattr(tables, "_gap", counted)
    engine.add(request("b", text, max_tokens=2))
    [sequence] = engine.sequences()
    assert not tables.begin(sequence, reserve=pool.available - 1)
    assert gaps <= 2 and sequence.refused is not None and len(sequence.refused[1]) <= 2
    engine.drain()
    check_answers(engine, request("b", text, max_tokens=2), set())


def test_a_group_that_lost_a_block_shortens_the_prefix_of_all() -> None:
    engine = FakeEngine(limits(windows=(None, None), num_blocks=40))
    engine.add(request("a", STEMS[0][:30], max_tokens=2))
    engine.drain()
    pool = engine.scheduler.pool
    pool.forget([list(pool._block_of[1].values())[3]])  # pyright: ignore[reportPrivateUsage]
    engine.add(request("b", STEMS[0][:30], max_tokens=2))
    engine.drain()
    assert engine.scheduler.prefix_hits == 12
    check_answers(engine, request("b", STEMS[0][:30], max_tokens=2), set())


def test_blocks_outside_the_window_are_freed() -> None:
    engine = FakeEngine(limits(windows=(6,), max_num_batched_tokens=8, num_blocks=16))
    engine.add(request("a", STEMS[0][:20], max_tokens=20, ignore_eos=True))
    [sequence] = engine.sequences()
    held: list[int] = []
    while engine.scheduler.unfinished:
        engine.turn()
        if sequence.status == Status.RUNNING:
            kept = [place for place, block in enumerate(sequence.blocks[0]) if block]
            # Of the last step's tokens the first saw five before itself; nothing older is kept.
            assert kept[0] >= (sequence.computed - 8 - 5) // 4
            assert engine.device.tables[0, sequence.row, : kept[0]].tolist() == [0] * kept[0]
            held.append(len(kept))
    assert max(held) <= 5 and max(held[-12:]) <= 3
    assert engine.answers["a", 0].tokens == Oracle(engine.limits).answer(sequence.request, 0).tokens


def test_samples_share_their_prompt_and_copy_what_they_write() -> None:
    engine = FakeEngine(limits())
    engine.add(request("a", STEMS[0][:10], n=4, max_tokens=6, ignore_eos=True))
    engine.turn()
    running = engine.scheduler.running
    assert len(running) == 4 and len({tuple(sequence.blocks[0]) for sequence in running}) == 1
    assert engine.plans[0].tokens == 10 and engine.plans[0].entries == 4
    engine.turn()
    assert len({tuple(sequence.blocks[0][:2]) for sequence in running}) == 1
    assert len({sequence.blocks[0][2] for sequence in running}) == 4
    assert len(engine.plans[1].copies) == 3
    engine.drain()
    streams = [tuple(engine.answers["a", i].tokens) for i in range(4)]
    assert len(set(streams)) == 4


def test_equal_prompts_of_one_step_share_blocks_that_it_fills() -> None:
    engine = FakeEngine(limits(max_num_batched_tokens=32))
    for name in "ab":
        engine.add(request(name, STEMS[0][:14]))
    engine.turn()
    assert engine.plans[0].tokens == 14 + 2  # all blocks but the last, which is not full
    engine.drain()
    assert engine.answers["a", 0].tokens == engine.answers["b", 0].tokens


@pytest.mark.parametrize("salts", [(None, "x"), ("x", "y")])
def test_other_salts_share_nothing(salts: tuple[str | None, str | None]) -> None:
    engine = FakeEngine(limits())
    for name, salt in zip("ab", salts, strict=True):
        engine.add(request(name, STEMS[0][:14], request=dict(cache_salt=salt)))
        engine.drain()
    engine.add(request("c", STEMS[0][:14], request=dict(cache_salt=salts[1])))
    cached = {update.request_id: update.num_cached_tokens for _ in range(20) for update in engine.turn()}
    assert cached == {"c": 12}
    assert [plan.tokens for plan in engine.plans if plan.slices[0].start in (0, 12)] == [14, 14, 2]


def test_cached_tokens_exclude_the_requests_own() -> None:
    engine = FakeEngine(limits(num_blocks=12, max_num_seqs=2, max_num_batched_tokens=32))
    for name, prompt in (("a", STEMS[0][:20]), ("b", STEMS[1][:16])):
        engine.add(request(name, prompt, max_tokens=16, ignore_eos=True))
    ended = [update for _ in range(60) for update in engine.turn() if update.finish_reason]
    assert engine.scheduler.preemptions
    assert [(update.request_id, update.num_cached_tokens) for update in ended] == [("a", 0), ("b", 0)]


@pytest.mark.parametrize("prompt", [3, 9])
def test_after_a_reset_no_old_block_is_found(prompt: int) -> None:
    engine = FakeEngine(limits())
    engine.add(request("a", STEMS[0][:prompt], max_tokens=16, ignore_eos=True))
    engine.turn()
    engine.scheduler.pool.reset()  # the weights have changed; what runs keeps its KV, part old, part new
    engine.drain()
    engine.add(request("b", STEMS[0][:prompt] + engine.answers["a", 0].tokens))
    engine.turn()
    assert engine.plans[-1].slices[0].start == 0
