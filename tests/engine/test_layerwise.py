# SPDX-License-Identifier: Apache-2.0
"""An engine that starts with its layers' programs in pieces gives what whole programs give."""

from collections.abc import Generator
from dataclasses import replace

import pytest

from jaxserve.engine.execute import layerwise
from jaxserve.engine.execute.background import Background
from jaxserve.engine.execute.layerwise import Layerwise
from jaxserve.models import decoder
from jaxserve.models.spec import ModelSpec, Rope
from tests.engine.driver import FULL, MIXED, Driver, alone
from tests.engine.test_one_result import check, single
from tests.engine.test_states import HYBRID, REQUESTS, Fading, FadingSum
from tests.engine.workloads import random_jobs, run
from tests.models import tiny

# Two kinds of RoPE and learned positions: whatever comes before the layers.
TURNED = tiny.grouped()
ENTERED = replace(
    FULL,
    layers=(
        tiny.block(TURNED, tiny.MLP),
        tiny.block(replace(TURNED, rope=Rope(dim=4, base=500.0)), tiny.MLP),
        tiny.block(TURNED, tiny.MLP),
    ),
    learned_positions=FULL.max_positions,
    embed_scale=1.5,
)
LATENT = replace(FULL, layers=(tiny.block(tiny.MLA, tiny.MLP), *[tiny.block(tiny.MLA, tiny.MOE)] * 2))


@pytest.fixture(autouse=True)
def always(monkeypatch: pytest.MonkeyPatch) -> Generator[None]:
    """In pieces however few layers share them, and until the end."""
    monkeypatch.setattr(layerwise, "WORTH", 0)
    monkeypatch.setattr(Background, "start", lambda background: None)
    monkeypatch.setitem(decoder.MIXERS, Fading, FadingSum)
    yield


@pytest.mark.parametrize(
    "spec", [FULL, MIXED, ENTERED, LATENT], ids=["each its own", "cache groups", "embeddings", "latent"]
)
def test_pieces_give_what_the_whole_gives(spec: ModelSpec) -> None:
    driver = Driver(spec, warmup="staged")
    found = [each for each in driver.runner._executables.values() if isinstance(each, Layerwise)]
    assert len(found) == 2
    for each in found:
        assert len(each.executables) == 2 + len(set(spec.layers))
    jobs = random_jobs(3, count=9, always={"logprobs": 2, "prompt_logprobs": None})
    check(jobs, run(driver, jobs), alone(single(spec), (job.request for job in jobs)))
    assert driver.engine.metrics().compiled_late == 0


def test_layers_that_keep_a_state() -> None:
    driver = Driver(HYBRID, warmup="staged")
    wanted = alone(Driver(HYBRID, async_scheduling=False), REQUESTS)
    got = driver.finish(*REQUESTS)
    assert {name: stream.tokens for name, stream in got.items()} == {name: s.tokens for name, s in wanted.items()}


def test_whole_programs_take_the_place_of_pieces() -> None:
    driver = Driver(FULL, warmup="staged")
    runner = driver.runner
    pending = [key for key, executable in runner._executables.items() if isinstance(executable, Layerwise)]
    metrics = driver.engine.metrics()
    assert metrics.programs_compiled + metrics.programs_pending == len(runner.every_key())
    with runner.on_mesh():
        for key in pending:
            runner.adopt(key, single(FULL).runner._executable(key))
    assert runner.num_compiled == metrics.programs_compiled + len(pending)
    jobs = random_jobs(4, count=4)
    check(jobs, run(driver, jobs), alone(single(FULL), (job.request for job in jobs)))


def test_recorded_steps_run_whole_programs() -> None:
    """A replay must give the same bits."""
    driver = Driver(FULL, warmup="staged", record_steps=4)
    assert not any(isinstance(each, Layerwise) for each in driver.runner._executables.values())


def test_few_layers_for_a_piece_are_not_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    same = tiny.block(tiny.grouped(), tiny.MLP)
    assert not layerwise.worth_it(replace(FULL, layers=(same,) * 2))
    assert layerwise.worth_it(replace(FULL, layers=(same,) * 3))
    assert not layerwise.worth_it(MIXED)
