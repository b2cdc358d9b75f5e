# SPDX-License-Identifier: Apache-2.0
"""The sweep adopts only tiles that are faster and right, under the keys that the ops look up."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from benchmarks.gpu.times import sweep, timing
from pallas_kernels.tuning import DecodeTiles
from tests.benchmarks.gpu.pages import Clock, a_page


def test_sweep_looks_where_the_ops_look(tmp_path: Path) -> None:
    full = sweep.shapes(False)
    page = a_page(tmp_path, tiny=False)
    found = {(tuned.op, sweep.looked_up(tuned, page)[0]) for tuned in full}
    assert len(found) == len(full), "each shape has a different key"


def test_merge_keeps_what_is_not_its_own(tmp_path: Path) -> None:
    path = tmp_path / "tuning.json"
    path.write_text(json.dumps({"other": {"op": {"k": {"a": 1}}}, "H200": {"op": {"old": {"a": 2}, "k": {"a": 3}}}}))
    sweep.merge(path, "H200", "op", "k", {"a": 9})
    assert json.loads(path.read_text()) == {
        "H200": {"op": {"k": {"a": 9}, "old": {"a": 2}}},
        "other": {"op": {"k": {"a": 1}}},
    }
    sweep.merge(path, "H200", "op", "k", None)
    sweep.merge(path, "H200", "op", "old", None)
    sweep.merge(path, "H200", "op2", "none", None)
    assert json.loads(path.read_text()) == {"other": {"op": {"k": {"a": 1}}}}


class FakeCase:
    """Stands for an op whose best tile is known: (seconds, result) by tile, or an error."""

    name, pool, bytes, flops = "fake", (), 0.0, 0.0

    def __init__(self, tiles: Any, table: dict[int, Any], clock: Clock) -> None:
        self.tiles, self.table, self.clock = tiles, table, clock

    def on_device(self, pool: Any) -> timing.Arrays:
        return timing.Arrays(0.0, None, [None])

    def compile(self, calls: int) -> Any:
        found = self.table[self.tiles.block_kv]
        if isinstance(found, Exception):
            raise found
        seconds, result = found
        return lambda *_: self.clock.pass_(seconds) or np.array([result], np.float32)


@pytest.mark.parametrize(
    ("table", "adopted"),
    [
        ({64: (6, 1.0), 32: (2, 1.0), 128: RuntimeError("RESOURCE_EXHAUSTED: shared memory")}, True),
        ({64: (6, 1.0), 32: (2, 1.5), 128: (9, 1.0)}, False),  # fast and wrong
        ({64: (2, 1.0), 32: (6, 1.0), 128: (6, 1.0)}, False),  # the default is best
    ],
)
def test_sweep_adopts_only_what_is_faster_and_right(
    table: dict[int, Any], adopted: bool, tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    default = DecodeTiles(block_kv=64)
    monkeypatch.setattr(sweep, "looked_up", lambda tuned, page: ("dim=1", default))
    kind = jax.devices()[0].device_kind
    ours = tmp_path / "ours.json"
    ours.write_text(json.dumps({kind: {"fake": {"dim=1": {"block_kv": 7}, "dim=2": {"block_kv": 8}}}}))
    knobs = ({"block_kv": (32, 64, 128)},)

    def case(tiles: Any) -> Any:
        return FakeCase(tiles or default, table, clock)

    tuned = sweep.Tuned("fake", case, knobs)
    row = sweep.search(a_page(tmp_path, table=ours), tuned, timing.Pools())
    assert row["adopted"] is adopted and row["tried"] == 3
    assert row["unfit"] == sum(isinstance(found, Exception) for found in table.values())
    entries = json.loads(ours.read_text())[kind]["fake"]
    assert entries.pop("dim=2") == {"block_kv": 8}, "other shapes stay"
    assert (entries["dim=1"]["block_kv"] == 32) if adopted else (entries == {})
    assert json.loads((tmp_path / "tuning.json").read_text()).get(kind, {}) == ({"fake": entries} if adopted else {})
