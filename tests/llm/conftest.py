# SPDX-License-Identifier: Apache-2.0
"""The fixtures of the Python API's tests: an LLM and an AsyncLLM per file, checked to be empty after each test."""

import time
from collections.abc import Generator

import pytest

from jaxserve.async_llm import AsyncLLM
from jaxserve.llm import LLM
from tests import tiny_llm
from tests.llm.checks import assert_empty, run, settled
from tests.tiny_llm import Reference


@pytest.fixture(scope="module")
def shared_llm() -> LLM:
    return tiny_llm.make()


@pytest.fixture
def llm(shared_llm: LLM) -> Generator[LLM]:
    yield shared_llm
    assert_empty(shared_llm)


@pytest.fixture(scope="module")
def shared_engine() -> Generator[AsyncLLM]:
    engine = tiny_llm.make_async()
    yield engine
    run(engine.shutdown())


@pytest.fixture
def engine(shared_engine: AsyncLLM) -> Generator[AsyncLLM]:
    yield shared_engine
    run(settled(shared_engine))


@pytest.fixture
def slow_steps(engine: AsyncLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes steps slow, so that the first request still runs when the later ones arrive."""
    step = engine._engine.step
    monkeypatch.setattr(engine._engine, "step", lambda: (time.sleep(0.02), step())[1])


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference(tiny_llm.params())
