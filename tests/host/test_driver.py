# SPDX-License-Identifier: Apache-2.0
"""The driver's loop: searches, ordinary requests and aborts in one engine; each ends once, and nothing is left."""

import random
from collections import Counter
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest

from jaxserve.errors import EngineError
from jaxserve.frontend.beam_search import beam_search_output
from jaxserve.frontend.outputs import OutputBuilder
from jaxserve.llm import LLM
from jaxserve.types.outputs import BeamSearchSequence, RequestOutput, Update
from jaxserve.types.request import Abort, Request
from jaxserve.types.sampling_params import BeamSearchParams, RequestOutputKind, SamplingParams
from tests import tiny_llm

PLAIN = SamplingParams(temperature=0, max_tokens=7, output_kind=RequestOutputKind.FINAL_ONLY)
PROMPTS = [list(range(30, 50)), [5], list(range(7, 20)), [9] * 11]


@pytest.fixture(scope="module")
def llm() -> LLM:
    return tiny_llm.make()


def search(width: int) -> BeamSearchParams:
    return BeamSearchParams(beam_width=width, max_tokens=8, length_penalty=0.5)


class Walk:
    """A Host that adds requests, aborts some at random, and counts the ends of each sample."""

    def __init__(self, llm: LLM, seed: int, turns: int = 20) -> None:
        self._llm, self._draws, self._turns = llm, random.Random(seed), turns
        self.requests: dict[str, Request] = {}
        self.aborted: set[str] = set()
        self.ends = Counter[tuple[str, int]]()
        self.outputs: dict[str, RequestOutput] = {}
        self._builders: dict[str, OutputBuilder] = {}

    def calls(self, *, idle: bool) -> bool:
        self._turns -= 1
        if self._turns > 0 and self._draws.random() < 0.6:
            prompt, width = self._draws.choice(PROMPTS), self._draws.randrange(5)
            preparer, deadline = self._llm._preparer, 0.0 if self._draws.random() < 0.05 else None
            if width:
                request = preparer.prepare_beams(prompt, search(width), deadline=deadline)
            else:
                request = preparer.prepare(prompt, PLAIN, deadline=deadline)
            self._llm._driver.add(request)
            self.requests[request.id] = request
            self._builders[request.id] = OutputBuilder(preparer.tokenizer, request)
        return self._turns > 0 or not idle

    def take(self, updates: list[Update]) -> Iterable[Abort]:
        for update in updates:
            self.ends[update.request_id, update.index] += update.finish_reason is not None
            output = self._builders[update.request_id].add(update)
            if output is not None:
                self.outputs[update.request_id] = output
        if self.requests and self._draws.random() < 0.1:
            chosen = self._draws.choice(list(self.requests))
            if chosen not in self.outputs:
                self.aborted.add(chosen)
                return [Abort(chosen)]
        return ()


@contextmanager
def few_blocks(llm: LLM, spare: int) -> Generator[None]:
    pool = llm._engine.scheduler.pool
    taken = pool.allocate(pool.available - spare)
    assert taken is not None
    try:
        yield
    finally:
        pool.release(taken)


def comparable(sequences: Iterable[BeamSearchSequence]) -> list[tuple[Any, ...]]:
    return [
        (each.tokens, pytest.approx(each.cum_logprob, abs=1e-3), each.text, each.finish_reason) for each in sequences
    ]


def assert_empty(llm: LLM) -> None:
    engine = llm._engine
    free, cached, used = engine.scheduler.pool.counts()
    assert used == 0 and free + cached == engine.limits.num_blocks - 1
    assert not engine.unfinished and not engine.in_flight() and not engine.queued and not llm._driver._searches
    assert len(engine.scheduler._free_rows) == engine.limits.max_num_seqs


@pytest.mark.parametrize(("seed", "spare"), [(0, 5), (1, 8), (2, 60)])
def test_searches_requests_and_aborts_at_once(llm: LLM, seed: int, spare: int) -> None:
    walk = Walk(llm, seed)
    with few_blocks(llm, spare):
        llm._driver.run(walk)
        assert llm._engine.scheduler.pool.counts()[2] > 0  # what was taken away
    assert_empty(llm)
    assert len(walk.requests) > 5 and walk.ends.keys() == {
        (request.id, index) for request in walk.requests.values() for index in range(request.params.n)
    }
    assert set(walk.ends.values()) == {1}
    for name, request in walk.requests.items():
        output = walk.outputs[name]
        cut = name in walk.aborted or request.deadline is not None
        if cut and {sample.finish_reason for sample in output.outputs} == {"abort"}:
            continue
        if request.beam_search is None:
            [alone] = llm.generate([list(request.prompt_token_ids)], PLAIN)
            assert output.outputs[0].token_ids == alone.outputs[0].token_ids
        else:
            found = beam_search_output(output, request.beam_search, llm.get_tokenizer())
            [whole] = llm.beam_search([list(request.prompt_token_ids)], request.beam_search)
            assert comparable(found.sequences) == comparable(whole.sequences)
    assert_empty(llm)


def test_a_failed_engine_ends_searches_too(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = tiny_llm.make()
    launch, launched = llm._engine.runner.launch, 0

    def broken(packed: Any) -> Any:
        nonlocal launched
        launched += 1
        if launched > 3:
            raise ValueError("of the device")
        return launch(packed)

    monkeypatch.setattr(llm._engine.runner, "launch", broken)
    with pytest.raises(EngineError, match="of the device"):
        llm.beam_search(PROMPTS, search(2))
    assert_empty(llm)


def test_ctrl_c_leaves_nothing_of_a_search(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    params, step, steps = replace(search(4), ignore_eos=True), llm._driver.step, 0

    def interrupted() -> list[Update]:
        nonlocal steps
        steps += 1
        if steps == 3:
            raise KeyboardInterrupt
        return step()

    monkeypatch.setattr(llm._driver, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.beam_search(PROMPTS, params)
    assert_empty(llm)
