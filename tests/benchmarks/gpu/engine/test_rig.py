# SPDX-License-Identifier: Apache-2.0
"""The rig's filled rows decode as if they had been computed, and its runs count the generated tokens."""

import numpy as np
import pytest

from benchmarks.gpu.engine.rig import Rig


@pytest.fixture(scope="module")
def rig() -> Rig:
    return Rig(tiny=True)


def test_rows_are_filled_as_if_they_had_been_computed(rig: Rig) -> None:
    """The device's block tables are the scheduler's, and decoding continues from the requested context."""
    rig.fill(2, 21)
    running = rig.engine.scheduler.running
    assert [sequence.prompt_len for sequence in running] == [21, 21]
    context = rig.context()
    assert 21 < context < 25  # the first row decodes while others are filled
    tables = np.asarray(rig.runner.tables)
    for sequence in running:
        [blocks] = sequence.blocks
        assert len(blocks) >= 3
        assert tables[0, sequence.row, : len(blocks)].tolist() == blocks
    assert len({block for s in running for block in s.blocks[0]}) == sum(s.num_blocks for s in running)
    _, tokens = rig.steps(6)
    assert tokens == 10  # the first step's result has not been read yet
    assert rig.context() == context + 5
    rig.clear()
    assert rig.engine.metrics().used_blocks == 0 and not rig.engine.unfinished


def test_a_decode_row(rig: Rig) -> None:
    row = rig.decode(2, 16)
    assert row["ms"] > 0 and row["device_ms"] > 0 and 16 < row["context"] < 40
    assert rig.engine.metrics().used_blocks == 0 and rig.engine.metrics().compiled_late == 0
    rig.runner.exercise()  # as on a GPU, with only these programs
    assert rig.engine.metrics().compiled_late == 0


def test_offline_counts_generated_tokens(rig: Rig) -> None:
    done = rig.run([(10, 6), (12, 3), (9, 1)], seconds=60)
    assert done.complete and sorted(done.answers) == [(9, 1), (10, 6), (12, 3)] and done.total == 41
    cut = rig.run([(10, 6)], seconds=0)
    assert not cut.complete and cut.answers == [] and not rig.engine.unfinished


def test_pools_hold_numbers_that_differ(rig: Rig) -> None:
    pool = np.asarray(rig.runner.cache[0]["k"]).astype(np.float32)
    assert np.isfinite(pool).all() and np.abs(pool).max() <= 1 and pool.std() > 0.4
    assert len(np.unique(np.asarray(rig.engine.runner.params["embed"]["weight"]).astype(np.float32))) > 500
