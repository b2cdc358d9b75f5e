# SPDX-License-Identifier: Apache-2.0
"""The offline benchmark's own parts; that it is fast is what the benchmark says, not a test."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from benchmarks import offline
from convert.load import load_model
from jaxserve.models.decoder import forward


class Fake:
    """A side that takes so many seconds and repeats each prompt's first id."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def generate(self, prompts: list[list[int]], new: int) -> dict[str, Any]:
        return {"seconds": self.seconds, "tokens": [prompt[:1] * new for prompt in prompts]}


def test_the_checkpoint_loads_and_is_the_same_each_time(tmp_path: Path) -> None:
    folders = [offline.make_checkpoint(tmp_path / name, offline.TINY, seed=0) for name in ("a", "b")]
    first, second = ((folder / "model.safetensors").read_bytes() for folder in folders)
    assert first == second
    spec, params = load_model(folders[0])
    tokens = np.asarray(offline.prompts_of(offline.TINY, 2, seed=0), np.int32)
    assert np.isfinite(np.asarray(jax.jit(forward, static_argnames="spec")(spec, params, tokens))).all()


def test_the_model_has_110_million_parameters() -> None:
    shape = offline.LlamaShape()
    layer = 4 * shape.hidden**2 + 3 * shape.hidden * shape.width
    assert 108e6 < shape.vocab * shape.hidden + shape.layers * layer < 112e6


def test_rows_compare_the_sides() -> None:
    shape = offline.TINY
    rows = offline.measure([Fake(0.5), Fake(1.0)], shape, counts=[1, 8], rounds=3, seed=0)
    assert [(row.prompts, row.ours, row.theirs, row.ratio, row.same, row.aim) for row in rows] == [
        (1, 8.0, 4.0, 2.0, 1.0, 2.0),
        (8, 64.0, 32.0, 2.0, 1.0, 1.7),
    ]
    assert "64.0" in offline.table(rows)


def test_without_a_peer() -> None:
    [row] = offline.measure([Fake(0.5)], offline.TINY, counts=[2], rounds=1, seed=0)
    assert row.ours == 16.0 and row.ratio is None
    assert "-" in offline.table([row])


def test_a_side_that_dies_is_reported(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="ended with code 3"):
        offline.GeneratorProcess([str(Path("/bin/sh")), "-c", "exit 3"])
