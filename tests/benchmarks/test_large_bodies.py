# SPDX-License-Identifier: Apache-2.0
"""A moment of what `python -m benchmarks.large_bodies` does."""

from pathlib import Path

from benchmarks import large_bodies
from tests.server import live as living


def test_a_stream_beside_large_bodies(tmp_path: Path) -> None:
    with living.live(living.write_model(tmp_path / "model")) as server:
        alone = large_bodies.measure(server.port, None, 0.5, new=200)
        beside = large_bodies.measure(server.port, large_bodies.KINDS[1], 0.5, new=200)
        server.wait_idle()
    assert (alone.clients, alone.answers) == (0, 0) and beside.clients == 8
    for each in (alone, beside):
        assert each.tokens > 0 and 0 < each.p50_ms <= each.p99_ms <= each.largest_ms
    assert large_bodies.KINDS[1].name in large_bodies.report([alone, beside])
