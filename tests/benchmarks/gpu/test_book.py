# SPDX-License-Identifier: Apache-2.0
"""The GPU run book on a CPU, with toy shapes: that it measures, that it notices, and that nothing is lost."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import facts, models
from benchmarks.gpu import book, command
from benchmarks.gpu.checks import attention as check_attention
from benchmarks.gpu.checks import matmul as check_matmul
from benchmarks.gpu.checks import poison
from benchmarks.gpu.checks import sampling as check_sampling
from benchmarks.gpu.checks import writes as check_writes
from benchmarks.gpu.sections import SECTIONS
from benchmarks.gpu.times import sweep, timing
from benchmarks.gpu.times.attention import decode_case, decode_target
from pallas_kernels import reference
from pallas_kernels.tuning import DecodeTiles

FACTS = {"machine": {"device": "none"}}


def tiny(out: Path, *arguments: str) -> int:
    return command.main(["--size", "tiny", "--seed", "3", "--out", str(out), *arguments])


def read(out: Path, section: str) -> dict[str, Any]:
    return json.loads((out / f"{section}.json").read_text())


def settings(out: Path, **changes: Any) -> book.Settings:
    return book.Settings(**{"out": out, "tiny": True, "seed": 1, "seconds": 60.0, "table": None} | changes)


def a_page(out: Path, **changes: Any) -> book.Page:
    return book.Page(SECTIONS[0], settings(out, **changes), FACTS, book.time.monotonic() + 60)


class Clock:
    """Time that passes only when told, so that a busy machine changes nothing."""

    now = 100.0

    def pass_(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    fake = SimpleNamespace(perf_counter=lambda: made.now, monotonic=lambda: made.now)
    monkeypatch.setattr(timing, "time", fake)
    monkeypatch.setattr(book, "time", fake)
    return made


# --- every section runs ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("section", [section.name for section in SECTIONS])
def test_section_is_complete(section: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tiny(tmp_path, "--section", section) == 0
    page = read(tmp_path, section)
    assert page["complete"] and page["error"] is None and page["skipped"] == []
    assert page["rows"] and all(row.get("ok", True) for row in page["rows"])
    assert page["seed"] == 3 and page["size"] == "tiny" and page["seconds"] > 0
    assert page["machine"].keys() >= {"device", "platform_version", "jax", "jaxlib", "python"}
    assert page["git"].keys() == {"commit", "dirty"}
    printed = capsys.readouterr().out
    assert all(row["case"][:40] in printed for row in page["rows"])
    assert not list(tmp_path.glob("*.partial"))
    if section.startswith("check_"):
        assert all(row["ok"] is True for row in page["rows"])
    if section.startswith("time_"):
        assert (tmp_path / "machine.json").exists(), "ceilings are measured when nobody asked for them"
        # A toy call may be lost in the noise; then the row says so, and gives no time.
        assert all((row["us"] or row["noise_us"] <= 0) and row["bytes"] > 0 for row in page["rows"])
    if section == "sweep":
        assert all(row["key"] and row["tried"] > 1 for row in page["rows"])


def test_machine_is_measured_once_per_folder(tmp_path: Path) -> None:
    wanted = [section for section in SECTIONS if section.name == "time_blocks"]
    assert [s.name for s in command.with_ceilings(wanted, tmp_path)] == ["machine", "time_blocks"]
    book.write_json(tmp_path / "machine.json", {"rows": [{"case": "copy", "gbps": 4000.0}]})
    assert command.with_ceilings(wanted, tmp_path) == wanted
    assert timing.Ceilings.load(a_page(tmp_path / "other")) == (None, None)


# --- wrong kernels are noticed -----------------------------------------------------------------------------------


def a_little_off(op: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    return lambda *args, **options: op(*args, **options) * jnp.bfloat16(1.02).astype(options["q"].dtype)


def wrong_tokens(op: Callable[..., Any]) -> Callable[..., Any]:
    def sample(*args: Any, **options: Any) -> Any:
        out = op(*args, **options)
        return out._replace(tokens=(out.tokens + 1) % 200)

    return sample


def next_group(op: Callable[..., Any]) -> Callable[..., Any]:
    return lambda lhs, rhs, offsets, **options: op(lhs, jnp.roll(rhs, 1, axis=0), offsets, **options)


def next_slot(op: Callable[..., Any]) -> Callable[..., Any]:
    def write(k_pool: Any, v_pool: Any, k: Any, v: Any, slots: Any, **scales: Any) -> Any:
        return op(k_pool, v_pool, k, v, jnp.where(slots >= 0, slots ^ 1, slots), **scales)

    return write


@pytest.mark.parametrize(
    ("module", "op", "wrong", "cases", "section"),
    [
        (check_attention, "paged_attention", a_little_off, "tiny_paged_cases", "check_paged"),
        (check_attention, "mla_attention", a_little_off, "tiny_mla_cases", "check_mla"),
        (check_matmul, "grouped_matmul", next_group, "cases", "check_grouped"),
        (check_sampling, "sample", wrong_tokens, "cases", "check_sampling"),
        (check_writes, "kv_write", next_slot, "write_cases", "check_kv_write"),
    ],
    ids=["paged", "mla", "grouped", "sampling", "kv_write"],
)
def test_wrong_kernel_fails(
    module: Any, op: str, wrong: Any, cases: str, section: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    all_cases = getattr(module, cases)
    monkeypatch.setattr(module, cases, lambda *args: all_cases(*args)[:1])
    monkeypatch.setattr(module, op, wrong(getattr(module, op)))
    assert tiny(tmp_path, "--section", section) == 1
    assert [(row["ok"], "error" in row) for row in read(tmp_path, section)["rows"]] == [(False, False)]


def test_one_wrong_token_does_not_drown() -> None:
    expected = np.random.default_rng(0).standard_normal((5000, 64))
    out = expected.copy()
    out[4000] *= 1.1
    row = check_attention.compare(out, expected, 8e-3)
    assert row["rel_error"] < 8e-3 and not row["ok"]
    out[4000] = expected[4000]
    assert check_attention.compare(out, expected, 8e-3)["ok"]
    out[7, 3] = np.nan
    assert not check_attention.compare(out, expected, 8e-3)["ok"]


def test_outputs_take_the_place_of_garbage() -> None:
    outcome = poison.run(lambda x: (x + 1, x > 0), jnp.arange(64, dtype=jnp.float32))
    assert outcome.repeatable and outcome.aliased
    assert (outcome.first[0] == np.arange(1, 65)).all()
    assert not poison.same_bits(np.zeros(2, np.float32), np.array([0.0, -0.0], np.float32))


def test_judge_accepts_only_what_rounding_explains() -> None:
    x = np.random.default_rng(0).standard_normal(1000)
    asked: dict[str, Any] = dict(seed=5, position=7, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0)
    best = check_sampling.judge(x, 0, **asked).token
    assert check_sampling.judge(x, best, **asked).exact
    scores = x - x.max() + reference.gumbel(5, 7, 1000)
    second = int(np.argsort(scores)[-2])
    assert not check_sampling.judge(x, second, **asked).accepted
    x[second] += scores[best] - scores[second] - 1e-5  # now a tie, within rounding
    verdict = check_sampling.judge(x, second, **asked)
    assert verdict.accepted and not verdict.exact
    not_largest = best if x.argmax() == second else second
    assert not check_sampling.judge(x, not_largest, **asked | {"top_k": 1}).accepted


# --- nothing is lost ---------------------------------------------------------------------------------------------


def section_of(name: str, run: Callable[[book.Page], None], share: float = 1.0) -> book.Section:
    return book.Section(name, "made up", share, ("value",), run)


def one_row(page: book.Page) -> None:
    page.add("a row", value=1.0)


def test_section_that_raises_leaves_the_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def breaks(page: book.Page) -> None:
        one_row(page)
        raise RuntimeError("gone wrong\nat length")

    sections = [section_of("first", one_row), section_of("bad", breaks), section_of("last", one_row)]
    assert book.run(sections, settings(tmp_path), FACTS) == 1
    assert read(tmp_path, "first")["complete"] and read(tmp_path, "last")["complete"]
    bad = read(tmp_path, "bad")
    assert bad["error"] == "RuntimeError: gone wrong" and not bad["complete"] and len(bad["rows"]) == 1
    assert "the section failed: RuntimeError: gone wrong" in capsys.readouterr().out


def test_case_that_raises_is_a_failed_row(tmp_path: Path) -> None:
    page = a_page(tmp_path)
    page.each([0, 1], lambda n: {"value": 1 / n}, name=str)
    assert page.rows[0]["ok"] is False and page.rows[0]["error"].startswith("ZeroDivisionError")
    assert page.rows[1]["value"] == 1 and page.failed == 1


def test_file_is_there_after_every_row(tmp_path: Path) -> None:
    page = a_page(tmp_path)
    seen: list[tuple[int, bool]] = []

    def measure(_: int) -> book.Row:
        now = read(tmp_path, "machine")
        seen.append((len(now["rows"]), now["complete"]))
        return {"value": float("nan")}

    page.each([0, 1, 2], measure, name=str)
    assert seen == [(0, False), (1, False), (2, False)]
    assert read(tmp_path, "machine")["rows"][0]["value"] == "nan"


def test_budget_cut_is_recorded(tmp_path: Path, clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    def slow(page: book.Page) -> None:
        page.each("abc", lambda _: clock.pass_(12) or {"value": 1.0}, name=str)

    sections = [section_of("slow", slow), section_of("later", slow, share=3.0)]
    assert book.run(sections, settings(tmp_path, seconds=40.0), FACTS) == 0
    first, second = read(tmp_path, "slow"), read(tmp_path, "later")
    assert [row["case"] for row in first["rows"]] == ["a"] and first["skipped"] == ["b", "c"]
    assert second["complete"], "a section has its own share"
    assert first["seconds"] == 12 and not first["complete"]
    assert "out of time, skipped 2: b, c" in capsys.readouterr().out


@pytest.mark.parametrize("seconds", ["nan", "-1"])
def test_seconds_must_make_sense(tmp_path: Path, seconds: str) -> None:
    with pytest.raises(SystemExit) as ended:
        tiny(tmp_path, "--seconds", seconds)
    assert ended.value.code == 2


def test_a_folder_that_cannot_be_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert tiny(tmp_path / "file" / "out") == 1
    assert capsys.readouterr().out.startswith("error: cannot make the folder")


def test_a_time_lost_in_noise_meets_no_target() -> None:
    case = decode_case(models.TINY, 2, 24)
    row = timing.achieved(case, timing.Timing(-1.5, float("inf"), 3.0), timing.Ceilings(None, None))
    assert row["us"] is None and row["noise_us"] == -1.5
    assert timing.Aim("us", 10, at_most=True).met(row) is None


def test_no_time_at_all(tmp_path: Path) -> None:
    assert tiny(tmp_path, "--section", "check_blocks", "time_decode", "--seconds", "0") == 0
    assert read(tmp_path, "check_blocks")["skipped"] and read(tmp_path, "time_decode")["rows"] == []


# --- the command line --------------------------------------------------------------------------------------------


def test_full_size_needs_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--out", str(tmp_path)]) == 1
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1 and "--size tiny" in printed and not list(tmp_path.iterdir())


def test_sections_by_name_and_by_beginning(capsys: pytest.CaptureFixture[str]) -> None:
    made = command.parser()
    names = [s.name for s in command.chosen(["time", "check_mla"], made)]
    assert names == ["check_mla", *(s.name for s in SECTIONS if s.name.startswith("time_"))]
    with pytest.raises(SystemExit):
        command.chosen(["nothing"], made)
    assert command.main(["--list"]) == 0
    listed = capsys.readouterr().out
    assert all(section.name in listed for section in SECTIONS)


def test_results_name_the_device_and_no_more() -> None:
    assert facts.default_out(tiny=True).name.endswith("-cpu-tiny")
    assert facts.git().keys() == {"commit", "dirty"}


# --- timing ------------------------------------------------------------------------------------------------------


def test_slope_cancels_what_is_the_same(clock: Clock) -> None:
    def program(calls: int) -> Callable[..., float]:
        return lambda *_: clock.pass_(0.004 + calls * 0.001) or 0.0

    programs = {n: program(n) for n in (2, 6)}
    measured = timing.slope(programs, timing.Arrays(0.0, None, [None]), donate=False)
    assert measured == pytest.approx((1000, 0, 4000))


def test_targets() -> None:
    assert decode_target(64, 1024) == timing.Aim("copy_pct", 70)
    assert decode_target(256, 1024) == timing.Aim("copy_pct", 85)
    assert decode_target(1, 1024) is None
    case = decode_case(models.LLAMA_8B, 64, 4096)
    floor_us = case.bytes / 4.3e6
    row = timing.achieved(case, timing.Timing(floor_us / 0.9, 0.0, 0.0), timing.Ceilings(4300.0, 790.0))
    assert row["met"] is True and row["copy_pct"] == pytest.approx(90)
    row = timing.achieved(case, timing.Timing(floor_us / 0.8, 0.0, 0.0), timing.Ceilings(4300.0, 790.0))
    assert row["met"] is False
    row = timing.achieved(case, timing.Timing(floor_us, 0.0, 0.0), timing.Ceilings(None, None))
    assert row["met"] is None and row["target"] == ">=85 copy_pct"
    assert timing.Aim("us", 10, at_most=True).met({"us": 9.0}) is True


def test_sets_of_inputs_differ_and_exceed_the_cache() -> None:
    case = decode_case(models.LLAMA_8B, 8, 1024)
    arrays = case.abstract()
    assert len(arrays.sets) * case.bytes > timing.BEYOND_CACHE
    tables = np.concatenate([np.asarray(ragged.block_tables) for ragged in _walks(case)])
    assert np.unique(tables).size == tables.size


def _walks(case: timing.Timed) -> Any:
    """The batches, from arrays made with a stand-in for the pool."""
    return case.arrays((jnp.zeros(()),) * 2).sets


# --- sweep -------------------------------------------------------------------------------------------------------


def test_sweep_looks_where_the_ops_look(tmp_path: Path) -> None:
    full = sweep.shapes(False)
    page = a_page(tmp_path, tiny=False)
    found = {(tuned.op, sweep.looked_up(tuned, page)[0]) for tuned in full}
    assert len(found) == len(full), "each shape has a key of its own"


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
    case: Any = lambda tiles: FakeCase(tiles or default, table, clock)  # noqa: E731
    tuned = sweep.Tuned("fake", case, knobs)
    row = sweep.search(a_page(tmp_path, table=ours), tuned, timing.Pools())
    assert row["adopted"] is adopted and row["tried"] == 3
    assert row["unfit"] == sum(isinstance(found, Exception) for found in table.values())
    entries = json.loads(ours.read_text())[kind]["fake"]
    assert entries.pop("dim=2") == {"block_kv": 8}, "other shapes stay"
    assert (entries["dim=1"]["block_kv"] == 32) if adopted else (entries == {})
    assert json.loads((tmp_path / "tuning.json").read_text()).get(kind, {}) == ({"fake": entries} if adopted else {})
