# SPDX-License-Identifier: Apache-2.0
"""The benchmark of batching and KV memory: its rows from fakes, the memory of a real engine, and all of it tiny."""

import json
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import batching, batching_requests, kv_memory, offline
from benchmarks.batching import Generated
from benchmarks.batching_requests import FULL, TINY, Asked
from benchmarks.kv_memory import CacheUse
from jaxserve.engine.execute import program_store


class Fake:
    """A side that takes so many seconds for every step of a batch, and answers with each prompt's first id."""

    def __init__(self, step: float) -> None:
        self.step = step
        self.asked: list[list[Asked]] = []

    def batch(self, requests: Sequence[Asked]) -> Generated:
        self.asked.append(list(requests))
        return Generated(self.step * max(one.new for one in requests), [one.prompt[:1] * one.new for one in requests])


def of_lengths(*lengths: int) -> list[Asked]:
    return [Asked([7], length) for length in lengths]


def tens(seed: int, count: int) -> list[Asked]:
    """So many answers of ten tokens."""
    return of_lengths(*[10] * count)


# --- requests -------------------------------------------------------------------------------------------------------


def test_requests_are_those_of_their_seed() -> None:
    chats = [batching_requests.chats(replace(FULL.chats, seed=seed), 1000, 200) for seed in (1, 1, 2)]
    even = [batching_requests.even(FULL, 1000, 200, seed=seed) for seed in (1, 1, 2)]
    for first, again, other in (chats, even):
        assert first == again and not {tuple(one.prompt) for one in first} & {tuple(one.prompt) for one in other}
        assert all(16 <= token < 1000 for one in first for token in one.prompt)
        assert max(len(one.prompt) + one.new for one in first) <= batching_requests.LONGEST
    answers = [one.new for one in chats[0]]
    assert min(answers) < 16 and max(answers) == 128, "chats are ragged"
    assert 98 < statistics.mean(one.new for one in even[0]) < 102 and {one.new for one in even[0]} <= set(
        range(80, 121)
    )


# --- rows -----------------------------------------------------------------------------------------------------------


def test_rows_compare_one_at_a_time_static_batches_and_ours() -> None:
    ours, theirs = Fake(0.1), Fake(0.1)
    [row] = batching.measure(
        ours,
        theirs,
        "chats",
        lambda seed, count: of_lengths(*[10, 30] * (count // 2)),
        counts=[32],
        rounds=3,
        seconds=99,
    )
    assert row.tokens_per_second == pytest.approx(640 / 3)
    one, static = row.peers["sequential"], row.peers["static"]
    # Alone a request takes as long as it is; in a batch all take as long as the longest, and only 20 of 30 steps count.
    assert (one.tokens_per_second, static.tokens_per_second) == pytest.approx((10, 640 / 6))
    assert (one.speedup, static.speedup) == pytest.approx((64 / 3, 2))
    assert (one.timed, one.same, static.timed, static.same) == (32, 1, 32, 1)
    assert [len(batch) for batch in theirs.asked[:2]] == [1, 1]  # in the first round ours, sequential, static
    assert sum(len(batch) == 16 for batch in theirs.asked) == 2 * 3
    shown = batching.table([row])
    assert "| chats | 32 | 213 |" in shown and "32 of 32" in shown and "21.3 x as fast" in shown


def test_a_turn_ends_with_its_time() -> None:
    theirs = Fake(1.0)
    [row] = batching.measure(Fake(0.01), theirs, "chats", tens, counts=[64], rounds=1, seconds=25)
    assert row.peers["sequential"].timed == 3 and row.peers["static"].timed == 48
    assert row.peers["sequential"].tokens_per_second == 1.0
    assert "3 of 64" in batching.table([row])


def test_one_request_is_no_batch_and_no_peer_is_none() -> None:
    ours = Fake(1)
    with_peer = batching.measure(ours, Fake(1), "chats", tens, counts=[1, 2], rounds=1, seconds=99)
    assert [list(row.peers) for row in with_peer] == [["sequential"], ["sequential", "static"]]
    # Few at once are done in several goes, and static batches are no larger than what is there at once.
    assert [row.asked for row in with_peer] == [16, 16]
    assert [len(batch) for batch in ours.asked] == [1] * 16 + [2] * 8
    assert [row.peers["sequential"].tokens_per_second for row in with_peer] == [1, 1]
    assert (with_peer[1].tokens_per_second, with_peer[1].peers["static"].tokens_per_second) == (2, 2)
    [alone] = batching.measure(Fake(1), None, "chats", tens, counts=[4], rounds=1, seconds=99)
    assert alone.peers == {} and "chats" in batching.table([alone])


def test_answers_of_other_lengths_are_refused() -> None:
    short = Fake(1)
    short.batch = lambda requests: Generated(1.0, [[1] for _ in requests])
    with pytest.raises(SystemExit, match="sequential returned a different number of tokens"):
        batching.measure(
            Fake(1), short, "chats", lambda seed, count: of_lengths(*[5] * count), counts=[1], rounds=1, seconds=99
        )


# --- memory ---------------------------------------------------------------------------------------------------------


def test_memory_is_of_the_steps_in_which_requests_waited() -> None:
    samples = [CacheUse(2, 5, 6, 80), CacheUse(4, 3, 10, 152), CacheUse(1, 0, 1, 3), CacheUse(0, 0, 0, 0)]
    found = kv_memory.summary(samples, requests=7, limits=(100, 16, 14), block_bytes=1000, preemptions=1)
    assert (found.steps, found.at_once_mean, found.at_once_most) == (2, 3, 4)
    assert found.at_once_reserved == 2  # 14 blocks, 7 for each
    assert (found.cache_bytes, found.used_mean_bytes, found.used_most_bytes) == (14_000, 8000, 10_000)
    assert (found.tokens_mean, found.reserved_mean_bytes) == (116, 3 * 7 * 1000)
    assert found.unused_percent == pytest.approx(100 * (1 - (80 / 96 + 152 / 160) / 2))
    assert found.reserved_unused_percent == pytest.approx(100 * (1 - (80 / 224 + 152 / 448) / 2))
    assert "1.5 x" in kv_memory.table(found)


@pytest.fixture
def nothing_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled programs go where the user has decided, here: nowhere."""
    monkeypatch.setattr(program_store, "open_store", lambda *_: None)


@pytest.mark.usefixtures("nothing_kept")
def test_the_memory_of_an_engine(tmp_path: Path) -> None:
    batching.main(["--tiny", "--parts", "memory", "--out", str(tmp_path / "found")])
    memory = json.loads((tmp_path / "found.json").read_text())["memory"]
    block_bytes = 2 * offline.TINY.layers * 4 * offline.TINY.hidden * 16  # keys and values, in float32
    assert memory["cache_bytes"] == TINY.reservations * (TINY.memory_longest // 16) * block_bytes
    assert memory["at_once_reserved"] == TINY.reservations < memory["at_once_mean"] <= memory["at_once_most"] <= 4
    assert memory["used_most_bytes"] <= memory["cache_bytes"]
    assert 0 < memory["unused_percent"] < memory["reserved_unused_percent"] < 100
    # No request holds more than a block that is not full.
    wasted = memory["used_mean_bytes"] - memory["tokens_mean"] * block_bytes / 16
    assert 0 < wasted < memory["at_once_mean"] * block_bytes


@pytest.mark.usefixtures("nothing_kept")
def test_speeds_without_a_peer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    batching.main(["--tiny", "--rounds", "1", "--parts", "chats", "offline", "--out", str(tmp_path / "found")])
    shown = json.loads((tmp_path / "found.json").read_text())
    assert [(row["load"], row["requests"]) for row in shown["rows"]] == [("chats", 1), ("chats", 2), ("offline", 5)]
    assert all(row["tokens_per_second"] > 0 for row in shown["rows"]) and shown["peer"] is None
    assert {"date", "git", "machine", "processor", "parts"} <= shown.keys()
    assert (tmp_path / "found.md").read_text().strip() in capsys.readouterr().out
