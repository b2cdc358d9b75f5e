# SPDX-License-Identifier: Apache-2.0
"""The run book's sections of the engine, beyond that they run (test_gpu_runbook.py): floors, filled rows, plans and
traces that are read right, children that die, and nothing imported that a GPU machine may lack."""

import gzip
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.gpu import book, children, processes
from benchmarks.gpu.dumps import launch_plan, trace
from benchmarks.gpu.dumps.trace import Event
from benchmarks.gpu.engine import rig as rigs
from benchmarks.gpu.engine import roofline, separate
from benchmarks.gpu.engine.gap import TRACED_AS_RUN
from benchmarks.gpu.engine.rig import Rig, model
from benchmarks.gpu.engine.roofline import Roofline
from benchmarks.gpu.engine.throughput import PEER_MIX, decode_cases, decode_target, judged, mixes, sharegpt
from benchmarks.gpu.sections import SECTIONS
from jaxserve.models import param_layout


@pytest.fixture(scope="module")
def rig() -> Rig:
    return Rig(tiny=True)


# --- floors ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama() -> Roofline:
    spec = model(tiny=False)
    return Roofline(spec, param_layout.abstract_params(spec, jnp.bfloat16))


@pytest.mark.parametrize(
    ("rows", "context", "ms"),
    [(1, 1024, 3.52), (64, 1024, 5.59), (256, 1024, 11.88), (1, 4096, 3.62), (128, 4096, 19.67)],
)
def test_floor_of_a_decode_step(llama: Roofline, rows: int, context: int, ms: float) -> None:
    """As worked out by hand for Llama-3.1-8B on an H200 of 4.3 TB/s; by hand the logits' way to and fro counts too."""
    found = roofline.bytes_ms(llama.step_bytes(rows, context), roofline.TABLE) or 0.0
    assert 0.96 * ms < found < 1.001 * ms


def test_operations_of_a_prefill(llama: Roofline) -> None:
    assert llama.prefill_flops(8192) == pytest.approx(131.9e12, rel=0.002)
    assert llama.prefill_flops(8192) > 4 * llama.prefill_flops(2048)


def test_floor_of_a_mix(llama: Roofline) -> None:
    """Of answers of one token there is the prefill alone; all else takes at least as long as its weights."""
    alone = llama.offline_ms([(8192, 1)], rows=1, ceilings=roofline.TABLE)
    assert alone == pytest.approx(llama.prefill_flops(8192) / 790e9)
    batch = llama.offline_ms([(1000, 1000)] * 256, rows=256, ceilings=roofline.TABLE)
    steps = 999 * (llama.weight_bytes(256) + 256 * 1500 * 131072) / 4.3e9
    assert batch == pytest.approx(steps + 256 * llama.prefill_flops(1000) / 790e9, rel=0.001)
    assert llama.offline_ms([(8, 8)], rows=1, ceilings=roofline.Ceilings(None, None)) is None


def test_what_is_asked_for() -> None:
    assert str(decode_target(1)) == ">=80 floor_pct" and str(decode_target(64)) == ">=85 floor_pct"
    assert decode_target(8) is None
    assert judged({"ms": 5.0, "floor_pct": 86.0}, decode_target(128))["met"] is True
    assert judged({"ms": 5.0, "floor_pct": None}, decode_target(128))["met"] is None


def test_lengths_like_those_of_chats() -> None:
    found = sharegpt(1000, longest=1024)
    assert found == sharegpt(1000, longest=1024)
    assert 100 < np.median([prompt for prompt, _ in found]) < 160
    assert max(max(pair) for pair in found) <= 1024 and min(min(pair) for pair in found) >= 2
    assert len(set(mixes(False)[PEER_MIX])) == 1, "a peer is told one length"


# --- filling --------------------------------------------------------------------------------------------------------


def test_rows_are_filled_as_if_they_had_been_computed(rig: Rig) -> None:
    """The device's block tables are the scheduler's, and decoding goes on from the context that was asked for."""
    rig.fill(2, 21)
    running = rig.engine.scheduler.running
    assert [sequence.prompt_len for sequence in running] == [21, 21]
    context = rig.context()
    assert 21 < context < 25  # the first decodes while others are filled
    tables = np.asarray(rig.runner.tables)
    for sequence in running:
        assert len(sequence.blocks) >= 3
        assert tables[sequence.row, : len(sequence.blocks)].tolist() == list(sequence.blocks)
    assert len({block for sequence in running for block in sequence.blocks}) == sum(len(s.blocks) for s in running)
    _, tokens = rig.steps(6)
    assert tokens == 10  # of the first step launched nothing is read yet
    assert rig.context() == context + 5
    rig.clear()
    assert rig.engine.metrics().used_blocks == 0 and not rig.engine.unfinished


def test_a_decode_row(rig: Rig) -> None:
    row = rig.decode(2, 16)
    assert row["ms"] > 0 and row["device_ms"] > 0 and 16 < row["context"] < 40
    assert rig.engine.metrics().used_blocks == 0 and rig.engine.metrics().compiled_late == 0
    rig.runner.exercise()  # as on a GPU: with these programs alone
    assert rig.engine.metrics().compiled_late == 0


def test_offline_counts_what_was_made(rig: Rig) -> None:
    done = rig.run([(10, 6), (12, 3), (9, 1)], seconds=60)
    assert done.complete and sorted(done.answers) == [(9, 1), (10, 6), (12, 3)] and done.total == 41
    cut = rig.run([(10, 6)], seconds=0)
    assert not cut.complete and cut.answers == [] and not rig.engine.unfinished


def test_pools_hold_numbers_that_differ(rig: Rig) -> None:
    pool = np.asarray(rig.runner.cache[0]["k"]).astype(np.float32)
    assert np.isfinite(pool).all() and np.abs(pool).max() <= 1 and pool.std() > 0.4
    assert len(np.unique(np.asarray(rig.engine.runner.params["embed"]["weight"]).astype(np.float32))) > 500


def test_most_of_a_card_is_given_to_the_cache(llama: Roofline) -> None:
    """Of an H200, as the product takes it: all sizes that are timed have room but the one that is too large for it."""
    taken = llama.weight_bytes(1) + 2 * llama.spec.vocab_size * llama.spec.hidden
    card = SimpleNamespace(memory_stats=lambda: {"bytes_limit": int(0.9 * 143771 * 2**20), "bytes_in_use": int(taken)})
    params = {"embed": {"weight": SimpleNamespace(devices=lambda: [card])}}
    tokens = 16 * rigs.settings(llama.spec, params, tiny=False)["num_blocks"]
    assert 850_000 < tokens < 880_000
    room = [rows * context < tokens for rows, context in decode_cases(False)]
    assert room == [case != (256, 4096) for case in decode_cases(False)]


# --- plans ----------------------------------------------------------------------------------------------------------

PLAN = """\
000: kCommandBuffer [source       | next=009 (1)] \n\
    001: kCopy         [source | sink] kCopy
    002: kCustomKernel [source | sink] kv_write grid: [4, 1, 1] threads: [128, 1, 1]  shared_memory: 0 bytes
009: kWhile         [prev=000 (1) | next=000 (1)]   \n\
condition:
    010: kCustomKernel [source | sink] loop_compare_fusion grid: [1, 1, 1] threads: [1, 1, 1]  shared_memory: 0 bytes
  body:
    011: kCopy         [prev=012 (1) | sink        ] kCopy
000: kCommandBuffer [prev=009 (1) | sink        ] \n\
    015: kCustomKernel [source | sink] gemm_fusion_dot_12 grid: [1, 1, 1] threads: [1, 1, 1]  shared_memory: 0 bytes
    016: kCustomKernel [source | sink] kv_write grid: [4, 1, 1] threads: [128, 1, 1]  shared_memory: 0 bytes
"""


def test_plan_is_read() -> None:
    plan = launch_plan.parse(PLAN)
    assert plan.graphs == 2
    assert plan.outside == ["kWhile", "loop_compare_fusion", "kCopy"]
    assert plan.launches == ["kCopy", "kv_write", *plan.outside, "gemm_fusion_dot_12", "kv_write"]
    assert plan.per_layer() == 5 and plan.layer()[-1] == "gemm_fusion_dot"
    assert plan.counts()["gemm_fusion_dot"] == 1
    assert launch_plan.parse("000: kGemm [source] x").per_layer() is None


# --- traces ---------------------------------------------------------------------------------------------------------


def events(*programs: str) -> list[Event]:
    """Of 10 us each: 1 us apart within a program, 30 us from one to the next."""
    found: list[Event] = []
    at, before = 0.0, None
    for program in programs:
        at += 30 if before not in (None, program) else 1
        found.append(Event(at, at + 10, program))
        at, before = at + 10, program
    return found


def test_gaps_between_programs_by_their_names() -> None:
    told = trace.summary(events(*(["model"] * 4 + ["head"]) * 3), 3)
    assert told["ends_by"] == "names" and told["kernels"] == 5 and told["busy_us"] == pytest.approx(50)
    assert told["between_us"] == pytest.approx(5 * 30 / 3) and told["idle_us"] == pytest.approx((5 * 30 + 9) / 3)


def test_gaps_between_programs_by_their_size() -> None:
    named = events(*(["model"] * 4 + ["head"]) * 3)
    told = trace.summary([Event(event.start, event.end, "") for event in named], 3)
    assert told["ends_by"] == "size" and told["between_us"] == pytest.approx(5 * 30 / 3)
    assert told["largest_us"] == pytest.approx(30)


def test_kernels_that_overlap_leave_no_gap() -> None:
    both = [Event(0, 100, "a"), Event(10, 20, "a"), Event(50, 120, "a"), Event(125, 130, "a")]
    assert trace.idle(both) == [(5, "a", "a")]


def test_a_cpu_has_no_lane(tmp_path: Path) -> None:
    assert trace.lanes(tmp_path) == []
    with jax.profiler.trace(tmp_path):
        jax.block_until_ready(jnp.ones(4) + 1)
    assert trace.lanes(tmp_path) == []


def test_events_are_read_as_jax_tells_them(tmp_path: Path) -> None:
    """The host's threads, called streams of a device: their events have the same form."""
    with jax.profiler.trace(tmp_path):
        jax.block_until_ready(jnp.ones(4) + 1)
    [path] = tmp_path.rglob("*.trace.json.gz")
    text = gzip.decompress(path.read_bytes()).decode().replace("/host:CPU", "/device:GPU:0").replace("tf_", "Stream ")
    path.write_bytes(gzip.compress(text.replace('"hlo_op"', '"hlo_module"').encode()))
    [lane] = trace.lanes(tmp_path)
    assert lane.name == "/device:GPU:0" and lane.events and all(e.end >= e.start >= 0 for e in lane.events)
    assert any(event.program for event in lane.events)
    assert trace.summary(lane.events, 1)["busy_us"] > 0


# --- children -------------------------------------------------------------------------------------------------------


def child(code: str, seconds: float = 60, **options: Any) -> children.Heard:
    return children.run([sys.executable, "-c", code], seconds=seconds, **options)


def test_what_a_child_says_is_heard() -> None:
    heard = child("print('a warning'); print('{\"a\": 1}'); print('{\"a\": 2, \"b\": 3}')")
    assert heard.merged() == {"a": 2, "b": 3} and heard.fault is None


def test_a_child_that_is_late_is_ended_and_what_it_said_counts() -> None:
    heard = child("import time\nprint('{\"done\": 7}', flush=True)\ntime.sleep(600)", seconds=3)
    assert heard.late and heard.merged() == {"done": 7} and heard.fault and heard.fault.startswith("ended after")


def test_a_child_that_dies_says_why() -> None:
    assert child("raise ValueError('no such thing')").fault == "code 1: ValueError: no such thing"
    assert child("import os; os.abort()").fault == "code -6: it said nothing"
    unknown = child("import jax; jax.devices()", env={"XLA_FLAGS": separate.UNKNOWN.flags})
    assert unknown.fault == "unknown flag"


def test_this_version_knows_the_flags() -> None:
    """All at once, but for the one that is tried in case a later version has it."""
    known = [variant.flags for variant in separate.VARIANTS if "raft" not in variant.name]
    known.append(TRACED_AS_RUN)
    assert child("import jax; jax.devices()", env={"XLA_FLAGS": " ".join(known)}).fault is None


BLOCKED = """
import importlib.abc, sys
class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in BLOCKED:
            raise ImportError(f"{name} is not there")
sys.meta_path.insert(0, Blocked())
import benchmarks.gpu.command, benchmarks.gpu.engine.child, jaxserve.engine.engine
from jax._src import xla_bridge
print('{"imported": true, "device": %s}' % str(xla_bridge.backends_are_initialized()).lower())
"""


def test_the_engine_needs_few_packages() -> None:
    """A machine with a GPU may have jax, flax and numpy, and nothing of a server's: msgspec and tqdm go there too."""
    others = {"transformers", "tokenizers", "huggingface_hub", "safetensors", "pydantic", "aiohttp", "llguidance"}
    others |= {"jinja2", "prometheus_client", "orbax", "torch", "pytest", "tyro", "hypothesis", "openai"}
    heard = child(f"BLOCKED = {others!r}\n{BLOCKED}")
    # Nor may an import touch the device: what jax takes of its memory is decided after it.
    assert heard.merged() == {"imported": True, "device": False}, heard.said[-300:]


# --- processes ------------------------------------------------------------------------------------------------------


def section(name: str) -> book.Section:
    return next(section for section in SECTIONS if section.name == name)


def test_sections_that_share_an_engine_share_a_process() -> None:
    found = {section.name: processes.process_of(section) for section in SECTIONS}
    assert found["check_paged"] == found["machine"] == "kernels"
    assert found["engine_decode"] == found["engine_gap"] == found["engine_offline"] == "engine"
    assert found["engine_start"] == found["engine_flags"] == found["engine_peer"] == "here"
    assert not processes.needed([section("machine"), section("sweep")]) and processes.needed([section("engine_peer")])
    names = [section.name for section in SECTIONS if section.name.startswith("engine_")]
    assert sorted(names, key=lambda name: found[name]) == names, "each process is started once"


def test_processes_of_their_own(tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setenv(children.SMALL, "false")  # as keep_small leaves it
    given = book.Settings(out=tmp_path, tiny=True, seed=3, seconds=60.0, table=None)
    told = {"machine": {"device": "none"}}
    assert processes.run([section("check_blocks"), section("engine_peer")], given, told) == 0
    assert book.read_rows(tmp_path / "check_blocks.json") and book.read_rows(tmp_path / "engine_peer.json")
    printed = capfd.readouterr().out
    assert "in a separate process: check_blocks" in printed and "engine_peer" in printed.split("all processes")[1]


def test_a_process_that_dies_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    given = book.Settings(out=tmp_path, tiny=True, seed=3, seconds=60.0, table=None)
    assert processes.run([section("check_blocks")], given, {}) == 1
