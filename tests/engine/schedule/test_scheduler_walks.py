# SPDX-License-Identifier: Apache-2.0
"""The scheduler over a device in plain numpy, in random walks compared with the oracle, without jax."""

import random
from dataclasses import dataclass
from typing import Any

from hypothesis import example, given, settings
from hypothesis import strategies as st

from jaxserve.engine.schedule.sequence import Sequence
from jaxserve.types.request import Request
from tests.engine.fake_oracle import GUESSES, Guesses, Oracle
from tests.engine.fakes import FakeEngine, check_answers, limits, request
from tests.engine.made_up_model import STEMS, VOCAB

# --- random walks ---------------------------------------------------------------------------------------------------


@st.composite
def engines(draw: st.DrawFn) -> FakeEngine:
    rows = draw(st.integers(1, 4))
    windows = draw(st.sampled_from([(None,), (None,), (3,), (9,), (None, 3), (None, 3, 3), (9, 3), (None, 9)]))
    budget = draw(st.integers(rows, 24))
    states = draw(st.sampled_from([False, False, True]))
    least = limits(windows=windows, max_num_seqs=rows, max_num_batched_tokens=budget, num_blocks=900).blocks_for(40)
    return FakeEngine(
        limits(
            max_num_seqs=rows,
            max_num_batched_tokens=budget,
            num_blocks=1 + draw(st.sampled_from([least, least + 1, least + 4, 4 * least])),
            windows=windows,
            states=states,
            enable_prefix_caching=draw(st.booleans()) and not states,
            priority=draw(st.booleans()),
        ),
        score_rows=draw(st.integers(1, 8)),
        depth=draw(st.sampled_from([1, 2])),
        staged=draw(st.sampled_from([False, False, True])),
    )


@dataclass
class Add:
    stem: int
    shared: int
    tail: list[int]
    params: dict[str, Any]
    request: dict[str, Any]
    drafts: str | None
    masked: bool


@dataclass
class Abort:
    which: int
    index: int | None


@dataclass
class Steps:
    count: int


@dataclass
class Reset:
    """The prefix cache is reset."""


@dataclass
class Withdraw:
    """The next plan cannot be packed, though nobody's fault is found."""


@dataclass
class Wait:
    """A second passes."""


tokens = st.integers(0, VOCAB - 1)
adds = st.builds(
    Add,
    stem=st.integers(0, 1),
    shared=st.sampled_from([0, 5, 12, 17, 26]),
    tail=st.lists(tokens, min_size=1, max_size=10),
    params=st.fixed_dictionaries(
        dict(
            n=st.sampled_from([1, 1, 1, 2, 4]),
            seed=st.integers(0, 2**33),
            max_tokens=st.sampled_from([1, 9, 15, None]),
            min_tokens=st.sampled_from([0, 0, 1]),
            stop_token_ids=st.lists(tokens, max_size=1),
            ignore_eos=st.booleans(),
            logprobs=st.sampled_from([None, None, 0, 2]),
            prompt_logprobs=st.sampled_from([None, None, None, 0, 1]),
            frequency_penalty=st.sampled_from([0, 0, 1]),
            skip_reading_prefix_cache=st.sampled_from([None, None, None, True, False]),
        )
    ),
    request=st.fixed_dictionaries(
        dict(
            priority=st.integers(-1, 1),
            tenant=st.sampled_from(["", "", "a", "b"]),
            cache_salt=st.sampled_from([None, None, None, "salt"]),
            score_only=st.sampled_from([False] * 7 + [True]),
            embed=st.sampled_from([False] * 5 + [True]),
            pool=st.sampled_from(["last", "first", "mean", "mean", "weighted_mean"]),
            deadline=st.sampled_from([None] * 7 + [2, 6]),
        ),
    ),
    drafts=st.sampled_from([*[None] * len(GUESSES), *GUESSES]),
    masked=st.sampled_from([False, False, False, True]),
)
others = st.one_of(
    st.none(),
    st.builds(Abort, st.integers(0, 9), st.sampled_from([None, 0, 1])),
    st.builds(Reset),
    st.builds(Wait),
    st.builds(Withdraw),
)
# Requests come in bursts, a step or a few between them, now and then something else.
rounds = st.tuples(st.lists(adds, min_size=1, max_size=3), st.builds(Steps, st.integers(0, 4)), others)
scripts = st.lists(rounds, min_size=3, max_size=7).map(
    lambda all: [action for burst, steps, other in all for action in (*burst, steps, other) if action]
)


@settings(max_examples=100)
@given(engines(), scripts)
def test_any_walk_gives_the_results_of_each_request_alone(engine: FakeEngine, script: list[object]) -> None:
    asked: dict[str, Request] = {}
    aborted: set[tuple[str, int | None]] = set()
    for action in script:
        match action:
            case Add(stem, shared, tail, params, extra, drafts, masked):
                n = min(params["n"], engine.limits.max_num_seqs)
                if extra["embed"]:
                    reads = params["skip_reading_prefix_cache"]
                    params, extra, n = dict(skip_reading_prefix_cache=reads), extra | dict(score_only=False), 1
                else:
                    extra = extra | dict(pool="last")
                name = f"request {len(asked)}"
                made = request(name, STEMS[stem][:shared] + tail, request=extra, **params | dict(n=n))
                drafter = Guesses(Oracle(engine.limits), made, drafts) if drafts else None
                engine.add(made, drafted_by=drafter, masked=masked and made.generates)
                asked[name] = made
            case Abort(which, index):
                name = f"request {which}"
                engine.scheduler.abort(name, index=index)
                aborted.add((name, index))
            case Steps(count):
                for _ in range(count):
                    engine.turn()
            case Reset():
                engine.scheduler.pool.reset()
            case Withdraw():
                engine.withdraws = True
            case Wait():
                engine.now += 1
            case _:
                raise AssertionError(action)
        engine.check()
    engine.drain()
    engine.check_over()
    for made in asked.values():
        check_answers(engine, made, aborted)


def first_steps(engine: FakeEngine, count: int) -> list[int]:
    """For each request in order of arrival, the turn of its first token."""
    seen: dict[str, int] = {}
    for turn in range(3000):
        for update in engine.turn():
            if update.token_ids:
                seen.setdefault(update.request_id, turn)
        if not engine.scheduler.unfinished:
            break
    return [seen[f"request {i}"] for i in range(count)]


@settings(max_examples=40)
@given(
    engines(), st.lists(st.tuples(st.integers(1, 30), st.integers(1, 4), st.integers(-1, 1)), min_size=2, max_size=12)
)
def test_first_tokens_come_in_order_of_arrival(engine: FakeEngine, asked: list[tuple[int, int, int]]) -> None:
    order: list[tuple[int, int]] = []
    for i, (length, n, priority) in enumerate(asked):
        n = min(n, engine.limits.max_num_seqs)
        # All different: who hits cached blocks of another gets on sooner, and takes nothing from anybody by that.
        made = request(f"request {i}", [i, *STEMS[0][:length]], n=n, request=dict(priority=priority), max_tokens=12)
        engine.add(made)
        order.append((priority if engine.limits.priority else 0, i))
    firsts = first_steps(engine, len(asked))
    ranked = [firsts[i] for _, i in sorted(order)]
    assert ranked == sorted(ranked)
    engine.check_over()


# --- beams ----------------------------------------------------------------------------------------------------------


class Beams:
    """A beam search that chooses at random, and compares each beam's updates with the oracle."""

    def __init__(self, engine: FakeEngine, prompt: list[int], *, width: int, rounds: int, seed: int) -> None:
        self.engine, self.width, self.rounds, self.draws = engine, width, rounds, random.Random(seed)
        engine.add(request("beams", prompt, temperature=0, logprobs=2, max_tokens=rounds + 1), hold=width)
        self.beams: dict[int, Sequence] = {0: engine.scheduler.requests["beams"][0]}
        self.reported: set[int] = set()
        self.next_index = 1

    def take(self) -> None:
        for update in self.engine.turn():
            if update.request_id != "beams" or update.index not in self.beams or update.finish_reason:
                continue
            assert update.logprobs and not update.token_ids and update.index not in self.reported
            tokens = self.beams[update.index].tokens
            right = Oracle(self.engine.limits).reported(tokens, update.logprobs[0].token, 2)
            assert update.logprobs == [right]
            self.reported.add(update.index)
        if self.reported == self.beams.keys():
            self.advance()

    def advance(self) -> None:
        self.reported, self.rounds = set(), self.rounds - 1
        if not self.rounds:
            return self.engine.scheduler.abort("beams")
        parents = self.draws.choices(sorted(self.beams), k=self.width)
        for index in self.beams.keys() - set(parents):
            self.engine.scheduler.abort("beams", index=index)
        kept: dict[int, Sequence] = {}
        for parent in parents:
            sequence, index = self.beams[parent], parent
            if parents.count(parent) > 1:
                index, self.next_index = self.next_index, self.next_index + 1
                sequence = self.engine.scheduler.branch(sequence, index)
                parents[parents.index(parent)] = -1
            kept[index] = sequence
        for sequence in kept.values():
            self.engine.scheduler.extend(sequence, self.draws.randrange(VOCAB))
        self.beams = kept


@settings(max_examples=60)
@given(engines(), st.integers(1, 20), st.integers(1, 4), st.integers(0, 9), st.integers(0, 3))
@example(FakeEngine(limits(max_num_seqs=2, num_blocks=11)), 6, 4, 0, 0)  # more beams than rows
@example(FakeEngine(limits(max_num_seqs=4, num_blocks=11)), 30, 4, 0, 0)  # more than blocks
def test_beams(engine: FakeEngine, prompt: int, width: int, seed: int, others: int) -> None:
    beams = Beams(engine, STEMS[0][:prompt], width=width, rounds=7, seed=seed)
    for i in range(others):
        engine.add(request(f"other {i}", STEMS[i % 2][: 5 * i + 3], max_tokens=9))
    for _ in range(2000):  # with a row and a token per step all beams are computed anew in turn
        if not engine.scheduler.unfinished and not engine.in_flight:
            break
        beams.take()
    assert not beams.rounds
    engine.check_over()
    for i in range(others):
        check_answers(engine, request(f"other {i}", STEMS[i % 2][: 5 * i + 3], max_tokens=9), set())
