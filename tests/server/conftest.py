# SPDX-License-Identifier: Apache-2.0
"""Fixtures for servers: a tiny model on disk and one server of it per test process, since a start takes seconds."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.server import live as living
from tests.server.live import Live


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return living.write_model(tmp_path_factory.mktemp("served") / "tiny")


@pytest.fixture(scope="session")
def live(model: Path) -> Iterator[Live]:
    with living.live(model) as server:
        yield server
