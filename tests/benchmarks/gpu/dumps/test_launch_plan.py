# SPDX-License-Identifier: Apache-2.0
"""Launch plans are read right."""

from benchmarks.gpu.dumps import launch_plan

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
