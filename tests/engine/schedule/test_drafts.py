# SPDX-License-Identifier: Apache-2.0
"""What drafts do to steps, memory and faults, one by one; test_scheduler_walks.py mixes them with everything else."""

from typing import Any

import pytest

from jaxserve.engine.schedule import drafts
from jaxserve.types.outputs import Update
from jaxserve.types.request import Request
from tests.engine.fake_oracle import GUESSES, Guesses, Oracle
from tests.engine.fakes import FakeEngine, check_answers, limits, request
from tests.engine.made_up_model import EOS, STEMS

LONG: dict[str, Any] = dict(max_tokens=24, ignore_eos=True)


class Fixed:
    """Proposes what a request without an end goes on with, or other tokens, always so many."""

    def __init__(self, engine: FakeEngine, made: Request, count: int, *, shift: int = 0) -> None:
        self.count, self.shift, self.asked = count, shift, list[int]()
        self.oracle, self.made = Oracle(engine.limits), made

    def propose(self, tokens: list[int]) -> list[int]:
        self.asked.append(len(tokens))
        text = list(tokens)
        for _ in range(self.count):
            text.append(self.oracle.following(self.made, 0, text))
        return [(token + self.shift) % self.oracle.limits.vocab_size for token in text[len(tokens) :]]


def run(engine: FakeEngine, made: Request, drafter: Any) -> list[list[int]]:
    """The tokens of each update."""
    engine.add(made, drafted_by=drafter)
    updates: list[Update] = []
    while engine.scheduler.unfinished or engine.in_flight:
        updates += engine.turn()
    engine.check_over()
    return [update.token_ids for update in updates]


@pytest.mark.parametrize("temperature", [0, 1], ids=["greedy", "random"])
def test_right_drafts_arrive_together(temperature: float) -> None:
    engine = FakeEngine(limits(), depth=1)
    made = request("a", STEMS[0][:6], temperature=temperature, **LONG)
    assert list(map(len, run(engine, made, Fixed(engine, made, 4)))) == [1, 5, 5, 5, 5, 3]
    assert [plan.tokens for plan in engine.plans] == [6, 5, 5, 5, 5, 3]
    check_answers(engine, made, set())


def test_an_overlapped_step_goes_on_where_only_the_device_knows() -> None:
    """After a step with drafts comes one of one token. The next drafts start behind the token that it samples."""
    for shift, tokens in ((0, [1, 4, 1, 4, 1, 4, 1, 4, 1, 3]), (1, [1] * 24)):
        engine = FakeEngine(limits(), depth=2)
        made = request("a", STEMS[0][:6], **LONG)
        assert list(map(len, run(engine, made, Fixed(engine, made, 4, shift=shift)))) == tokens
        assert [plan.unsure for plan in engine.plans[:6]] == [[], [], [0], [], [0], []]
        check_answers(engine, made, set())


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("kind", GUESSES)
def test_results_do_not_depend_on_the_drafter(kind: str, depth: int, capsys: pytest.CaptureFixture[str]) -> None:
    engine = FakeEngine(limits(num_blocks=24), depth=depth)
    asked = [request(f"{i}", STEMS[i % 2][: 5 + i], seed=i, n=1 + i % 2, logprobs=1, **LONG) for i in range(5)]
    for made in asked:
        engine.add(made, drafted_by=Guesses(Oracle(engine.limits), made, kind))
        engine.turn()
    engine.drain()
    engine.check_over()
    for made in asked:
        check_answers(engine, made, set())
    assert any(slice.drafts for plan in engine.plans for slice in plan.slices)
    assert ("Error: " in capsys.readouterr().err) == (kind in ("no list", "fault"))


def test_tokens_after_a_stop_token_are_dropped() -> None:
    """The drafts after it are right, as the device sees it."""
    found = 0
    for seed in range(40):
        engine = FakeEngine(limits(), depth=1 + seed % 2)
        made = request("a", STEMS[0][:6], seed=seed, max_tokens=30, stop_token_ids=[7, 9])
        last = run(engine, made, Fixed(engine, made, 6))[-1]
        check_answers(engine, made, set())
        answer = engine.answers["a", 0]
        assert answer.tokens[-1] in (EOS, 7, 9) or answer.reason == "length"
        found += answer.reason == "stop" and 1 < len(last) < 7
    assert found > 5


def test_nothing_is_computed_beyond_the_end() -> None:
    """Neither of the request nor of the model: drafts are fewer than proposed."""
    for depth in (1, 2):
        engine = FakeEngine(limits(max_model_len=17), depth=depth)
        made = request("a", STEMS[0][:6], max_tokens=None, ignore_eos=True)
        run(engine, made, Fixed(engine, made, 16))
        assert len(engine.answers["a", 0].tokens) == 11
        stops = [slice.start + slice.count for plan in engine.plans for slice in plan.slices]
        assert max(stops) == 16, "the last token needs no KV"


def test_wrong_drafts_are_not_cached() -> None:
    """Blocks that hold their KV are full, but not of the sequence's tokens."""
    engine = FakeEngine(limits(), depth=2)
    made = request("a", STEMS[0][:7], **LONG)
    engine.add(made, drafted_by=Fixed(engine, made, 9, shift=1))
    pool = engine.scheduler.pool
    while engine.scheduler.unfinished:
        engine.turn()
        for sequence in engine.sequences():
            assert sequence.published * 4 <= min(sequence.settled, len(sequence.tokens))
    text = [*made.prompt_token_ids, *engine.answers["a", 0].tokens]
    again = request("b", [*text, 1], max_tokens=4)
    run(engine, again, None)
    check_answers(engine, again, set())
    assert engine.scheduler.prefix_hits >= len(text) // 4 * 4 - 8 and pool.counts()[1]


@pytest.mark.parametrize(
    "params", [dict(frequency_penalty=1.0), dict(min_tokens=3), dict(logit_bias={5: 1.0}), dict(allowed_token_ids=[5])]
)
def test_controls_get_no_drafts(params: dict[str, Any]) -> None:
    engine = FakeEngine(limits())
    made = request("a", STEMS[0][:6], **LONG | params)
    drafter = Fixed(engine, made, 4)
    engine.add(made, drafted_by=drafter)
    for _ in range(10):
        engine.turn()
    assert not drafter.asked and all(slice.count <= 1 for plan in engine.plans[1:] for slice in plan.slices)


def test_beams_and_recurrent_layers_get_no_drafts() -> None:
    """A beam waits after each token; a wrong draft would change the state of a layer."""
    for bounds, hold in ((limits(), 2), (limits(states=True, enable_prefix_caching=False), 0)):
        engine = FakeEngine(bounds)
        made = request("a", STEMS[0][:6], logprobs=2, **LONG)
        drafter = Fixed(engine, made, 4)
        engine.add(made, hold=hold, drafted_by=drafter)
        for _ in range(5):
            engine.turn()
        assert not drafter.asked


def test_prompts_and_other_rows_come_first() -> None:
    engine = FakeEngine(limits(max_num_batched_tokens=12), depth=1)
    made = request("a", STEMS[0][:6], **LONG)
    engine.add(made, drafted_by=Fixed(engine, made, 16))
    for _ in range(3):
        engine.turn()
    assert engine.plans[-1].tokens == 9, "as many drafts as there are rows of logits"
    engine.add(request("b", STEMS[1][:20], max_tokens=3))
    while not engine.answers["b", 0].tokens:
        engine.turn()
    assert [[slice.count for slice in plan.slices] for plan in engine.plans[3:]] == [[1, 11], [3, 9]]
    engine.drain()
    engine.check_over()


@pytest.mark.parametrize("wants", [dict(embed=True, pool="mean"), dict(score_only=True)], ids=["mean", "scores"])
def test_they_leave_the_entries_to_what_needs_all_hidden_states_of_a_prompt(wants: dict[str, Any]) -> None:
    """An engine has a fixed number of entries in a step, which `turn` checks."""
    engine = FakeEngine(limits(), score_rows=8)
    shown = dict(prompt_logprobs=0) if "score_only" in wants else {}
    engine.add(request("long", STEMS[0][:36], request=wants, **shown))
    made = request("drafted", STEMS[1][:4], **LONG)
    engine.add(made, drafted_by=Fixed(engine, made, 7))
    while engine.answers["long", 0].reason is None:
        assert not any(slice.drafts for plan in engine.plans[:-1] for slice in plan.slices)
        engine.turn()
    engine.drain()
    assert any(slice.drafts for plan in engine.plans for slice in plan.slices)
    check_answers(engine, made, set())
    engine.check_over()


def test_drafts_preempt_nothing() -> None:
    """They get blocks that no sequence needs in the same step."""
    drafted = preemptions = 0
    for blocks in range(11, 24):
        engine = FakeEngine(limits(num_blocks=blocks), depth=1 + blocks % 2)
        for i in range(3):
            made = request(f"{i}", STEMS[i % 2][: 5 + i], seed=i, **LONG)
            engine.add(made, drafted_by=Fixed(engine, made, 8, shift=i % 2))
        while engine.scheduler.unfinished:
            before, steps = engine.scheduler.preemptions, len(engine.plans)
            engine.turn()
            if any(slice.drafts for plan in engine.plans[steps:] for slice in plan.slices):
                assert engine.scheduler.preemptions == before
                drafted += 1
            preemptions += engine.scheduler.preemptions - before
    assert drafted > 100 and preemptions > 10, (drafted, preemptions)


def test_a_row_of_logits_that_does_not_count_may_be_infinite() -> None:
    for shift in (0, 1):
        engine = FakeEngine(limits(), depth=2)
        made = request("a", STEMS[0][:6], **LONG)
        right = Oracle(engine.limits).answer(made, 0).tokens
        engine.device.broken = set(range(40)) - {*made.prompt_token_ids, *right}
        assert any((token + 1) % 40 in engine.device.broken for token in right)
        run(engine, made, Fixed(engine, made, 4, shift=shift))
        check_answers(engine, made, set())
    engine = FakeEngine(limits(), depth=2)
    engine.device.broken = {right[9]}
    run(engine, made, Fixed(engine, made, 4))
    answer = engine.answers["a", 0]
    assert (
        answer.reason == "error"
        and "not finite" in (answer.error or "")
        and answer.tokens == right[:10][: len(answer.tokens)]
    )


def test_a_plan_with_drafts_is_withdrawn() -> None:
    """What was promised for them is forgotten with it."""
    engine = FakeEngine(limits(), depth=1)
    asked = [request(name, STEMS[0][:6], seed=ord(name), **LONG) for name in "ab"]
    for made in asked:
        engine.add(made, drafted_by=Fixed(engine, made, 3))
    for turn in range(8):
        if turn in (2, 4):
            plan = engine.scheduler.schedule(engine.now)
            assert plan is not None and any(slice.drafts for slice in plan.slices) == (turn == 2 or turn == 4)
            engine.scheduler.withdraw(plan, [], "")
            assert all(sequence.unsure == 0 for sequence in engine.sequences())
            engine.check()
        engine.turn()
    engine.drain()
    engine.check_over()
    for made in asked:
        check_answers(engine, made, set())


def test_what_is_no_token_ends_a_proposal() -> None:
    class Odd:
        def propose(self, tokens: list[int]) -> Any:
            return self.proposal

        proposal: Any = None

    odd = Odd()
    for odd.proposal, expected in (
        ([1, 2, 3, 4, 5], [2, 3, 4]),
        ((1, 2), [2]),
        ([1, 2, 50, 3], [2]),
        ([1, -1, 3], []),
        ([1, 2, 2**80], [2]),
        ([1, 2, "3"], [2]),
        ([1, 2.0], []),
        ([], []),
    ):
        assert drafts.of(odd, [0], skip=1, most=3, vocab_size=50) == expected
