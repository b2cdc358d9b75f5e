# SPDX-License-Identifier: Apache-2.0
"""Several tokens per step from a real model: the tokens of a run without drafts, in fewer steps; test_one_result.py
compares every kind of request."""

from dataclasses import replace
from typing import Any

import pytest

from jaxserve.engine.execute import recorder
from jaxserve.engine.schedule.need import Variant
from jaxserve.engine.schedule.packing import Layout
from jaxserve.types.outputs import Update
from jaxserve.types.request import Request
from jaxserve.types.sampling_params import SamplingParams
from tests.engine.driver import Driver, Known, Streams

PROMPT = [11, 42, 7, 42, 88, 5, 11, 60, 23, 9]


def requests(**params: Any) -> list[Request]:
    asked: dict[str, dict[str, Any]] = {
        "greedy": dict(temperature=0, max_tokens=30),
        "random": dict(seed=5, max_tokens=26),
        "filtered": dict(seed=7, top_k=9, top_p=0.9, logprobs=2, max_tokens=28),
    }
    return [
        Request(id=name, prompt_token_ids=[*PROMPT, i], params=SamplingParams(ignore_eos=True, **own | params))
        for i, (name, own) in enumerate(asked.items())
    ]


@pytest.fixture(scope="module")
def plain() -> Streams:
    return Driver().finish(*requests())


@pytest.mark.parametrize("overlap", [False, True], ids=["one at a time", "overlapped"])
def test_several_tokens_in_one_step(overlap: bool, plain: Streams) -> None:
    driver = Driver(async_scheduling=overlap, drafts=Known(plain, rate=1.0))
    updates: list[Update] = []
    driver.add(*requests())
    while driver.engine.unfinished:
        updates += driver.turn()
    found = driver.streams
    assert {name: stream.tokens for name, stream in found.items()} == {n: s.tokens for n, s in plain.items()}
    assert max(len(update.token_ids) for update in updates) > 3
    for update in updates:
        if update.request_id == "filtered":
            assert [entry.token for entry in update.logprobs or []] == update.token_ids
    assert driver.engine.metrics().steps < (25 if overlap else 18)
    assert driver.engine.metrics().generated_tokens == 30 + 26 + 28


def test_a_stop_token_among_them(plain: Streams) -> None:
    for overlap in (False, True):
        for request in requests():
            text = plain[request.id, 0].tokens
            stop = max(text, key=text.index)  # the last one that is new
            made = replace(request, params=replace(request.params, stop_token_ids=[stop]))
            driver = Driver(async_scheduling=overlap, drafts=Known(plain, rate=1.0))
            stream = driver.finish(made)[request.id, 0]
            assert stream.tokens == text[: text.index(stop) + 1]
            assert (stream.finish_reason, stream.stop_reason) == ("stop", stop)


def test_steps_with_drafts_replay_bit_for_bit(plain: Streams) -> None:
    driver = Driver(record_steps=1000, drafts=Known(plain, rate=0.7))
    driver.finish(*requests())
    kept = driver.engine._recorder
    assert kept is not None
    steps = list(kept._kept)
    assert any(step.entries > 3 for step in steps)
    assert list(recorder.replay(Driver().runner, steps)) == [None] * len(steps)


def test_rows_of_one_token_cost_what_they_did(plain: Streams) -> None:
    """A step that decodes is two programs on one vector, and that vector says where each row starts."""
    driver = Driver()
    runner, used, puts = driver.runner, list[Any](), 0
    executable, put = runner._executable, runner._put

    def noted(key: Any) -> Any:
        used.append(key)
        return executable(key)

    def counted(arrays: Any) -> Any:
        nonlocal puts
        puts += 1
        return put(arrays)

    runner._executable, runner._put = noted, counted
    driver.add(*requests())
    driver.turn()
    used.clear()
    puts = 0
    while driver.engine.unfinished:
        steps = driver.engine.metrics().steps
        driver.turn()
        if driver.engine.metrics().steps > steps:
            layout, (rows, head) = used
            assert isinstance(layout, Layout) and layout.decode and rows >= layout.rows and isinstance(head, Variant)
            assert puts == 1
        used.clear()
        puts = 0
    assert {name: stream.tokens for name, stream in driver.streams.items()} == {n: s.tokens for n, s in plain.items()}
