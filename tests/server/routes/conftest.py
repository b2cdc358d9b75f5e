# SPDX-License-Identifier: Apache-2.0
"""Fixtures for routes: one application per test process, since another costs seconds of compilation."""

import asyncio
from collections.abc import Iterator

import pytest

from jaxserve.async_llm import AsyncLLM
from tests import tiny_llm
from tests.server.routes.served import Served
from tests.tiny_llm import Reference


@pytest.fixture(scope="session")
def async_llm() -> Iterator[AsyncLLM]:
    llm = tiny_llm.make_async(scheduling_policy="priority")
    yield llm
    asyncio.run(llm.shutdown())


@pytest.fixture(scope="session")
def served(async_llm: AsyncLLM) -> Iterator[Served]:
    with Served(async_llm) as one:
        yield one


@pytest.fixture(scope="session")
def strict(async_llm: AsyncLLM) -> Iterator[Served]:
    """Refuses unknown fields."""
    with Served(async_llm, unknown_fields="refuse") as one:
        yield one


@pytest.fixture(scope="session")
def reference() -> Reference:
    """The same model as a dense forward pass."""
    return Reference(tiny_llm.params())
