# SPDX-License-Identifier: Apache-2.0
"""The GPU run book times what it claims: N calls of the op, one after the other, in one CUDA graph.

One full-size row of every timed section is compiled for an H200, and the first variants of its sweep.
"""

import re
from pathlib import Path
from typing import Any

import jax
import pytest

from benchmarks import models
from benchmarks.gpu.times import attention as time_attention
from benchmarks.gpu.times import matmul as time_matmul
from benchmarks.gpu.times import quant as time_quant
from benchmarks.gpu.times import sampling as time_sampling
from benchmarks.gpu.times import sweep
from benchmarks.gpu.times import writes as time_writes
from benchmarks.gpu.times.timing import Timed
from pallas_kernels import dispatch
from pallas_kernels.tuning import DecodeTiles
from tests.cuda.hopper import ABSTRACT_H200, compile_for_h200, specs

CASES = {
    "decode": time_attention.decode_case(models.LLAMA_8B, 64, 4096),
    "decode fp8": time_attention.decode_case(models.LLAMA_8B, 8, 1024, kv="float8_e4m3fn"),
    "ragged": time_attention.ragged_case(models.LLAMA_8B, 8192),
    "mla": time_attention.mla_case(64, 4096),
    "kv_write": time_writes.write_case(models.LLAMA_8B, 256),
    "kv_write fp8": time_writes.write_case(models.LLAMA_8B, 256, kv="float8_e4m3fn", scales="slot"),
    "blocks": time_writes.block_case("llama-8b", (16, 8, 128), 1024, staged=True),
    "grouped decode": time_matmul.grouped_case(time_matmul.QWEN3_30B, 64, "gate_up"),
    "grouped prefill": time_matmul.grouped_case(time_matmul.QWEN3_30B, 4096, "down"),
    "quant": time_quant.quant_case(time_quant.AWQ, 14336, 4096, 16),
    "sampling greedy": time_sampling.sampling_case(256, "greedy"),
    "sampling filtered": time_sampling.sampling_case(256, "both"),
}


def kernel_calls(hlo: str) -> list[str]:
    return re.findall(r"custom-call\(.*?custom_call_target=\"__gpu\$xla\.gpu\.triton\"", hlo)


def compiled(case: Timed, calls: int) -> Any:
    return compile_for_h200(case.chain(calls), *case.abstract(), donate=(0,) if case.donate else ())


@pytest.mark.parametrize("name", CASES)
def test_chain_holds_every_call(name: str) -> None:
    case = CASES[name]
    one, several = compiled(case, 1), compiled(case, 8)
    assert len(kernel_calls(one.hlo)) > 0
    assert len(kernel_calls(several.hlo)) == 8 * len(kernel_calls(one.hlo))
    # No copies of anything: not of a cache, not of logits, not of queries.
    assert not re.findall(r"\bcopy(?:-start)?\(", several.hlo)
    # At most one tiny kernel between two calls, which makes the second wait for the first; the matmul by group and that
    # with narrow weights need two kernels anyway, which contain the wait.
    beside = 2 if name.startswith(("grouped", "quant")) else 1
    assert len(re.findall(r"\bfusion\(", several.hlo)) <= 8 * beside + 1
    if case.donate:
        assert several.alias_bytes >= sum(spec.size * spec.dtype.itemsize for spec in case.pool)


@pytest.mark.parametrize("graphs", [True, False])
def test_launch_plan_shows_whether_kernels_are_captured(graphs: bool, tmp_path: Path) -> None:
    """What the `hazards` section looks for, and the option that turns capturing off."""
    case = CASES["kv_write"]
    options: dict[str, Any] = {"xla_dump_to": str(tmp_path), "xla_dump_hlo_as_text": True}
    if not graphs:
        options["xla_gpu_enable_command_buffer"] = ""
    with dispatch.use("kernel"), jax.sharding.use_abstract_mesh(ABSTRACT_H200):
        lowered = case.chain(8).trace(*specs(tuple(case.abstract()))).lower()
    lowered.compile(compiler_options=options)
    plans = [path.read_text() for path in tmp_path.rglob("*thunk_sequence*")]
    assert plans and any("kCommandBuffer" in plan for plan in plans) is graphs
    assert all(plan.count("kCustomKernel") == 8 for plan in plans)


def test_a_variant_that_does_not_fit_is_an_error_and_not_a_crash() -> None:
    """Wide tiles in many stages need more shared memory than the chip has; the sweep relies on the error."""
    tuned = next(t for t in sweep.shapes(False) if t.op == "paged_decode")
    fits = DecodeTiles(block_kv=64, num_stages=3)
    with pytest.raises(Exception, match=r"(?i)shared memory|RESOURCE_EXHAUSTED|INTERNAL"):
        compiled(tuned.case(DecodeTiles(block_kv=512, num_stages=8)), 2)
    assert kernel_calls(compiled(tuned.case(fits), 2).hlo)
