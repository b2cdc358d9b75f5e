# SPDX-License-Identifier: Apache-2.0
"""Tests of GGUF files write their folders where nobody else does."""

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache of folders that are made of GGUF files."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/jaxserve/gguf"
