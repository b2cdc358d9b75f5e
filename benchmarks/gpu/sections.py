# SPDX-License-Identifier: Apache-2.0
"""The sections of the run book, in their order. A share is roughly the seconds a section needs on one H200."""

from benchmarks.gpu import (
    check_attention,
    check_matmul,
    check_models,
    check_sampling,
    check_writes,
    hazards,
    machine,
    sweep,
    time_attention,
    time_matmul,
    time_others,
    time_steps,
    timing,
)
from benchmarks.gpu.book import Section

SECTIONS = (
    Section("machine", "copy bandwidth, bf16 matmul rate, state of the card", 15, machine.COLUMNS, machine.run),
    Section("check_paged", "paged attention against float64", 60, check_attention.COLUMNS, check_attention.run_paged),
    Section("check_mla", "latent attention against float64", 20, check_attention.COLUMNS, check_attention.run_mla),
    Section("check_kv_write", "KV writes, exact", 15, check_writes.WRITE_COLUMNS, check_writes.run_kv_write),
    Section("check_blocks", "block moves, exact", 10, check_writes.BLOCK_COLUMNS, check_writes.run_blocks),
    Section("check_sampling", "sampling against float64", 60, check_sampling.COLUMNS, check_sampling.run),
    Section("check_grouped", "matmul by group against float64", 45, check_matmul.COLUMNS, check_matmul.run),
    Section("check_models", "golden checkpoints against transformers", 60, check_models.COLUMNS, check_models.run),
    Section("hazards", "races, far offsets, grid limits, CUDA graphs, donation", 50, hazards.COLUMNS, hazards.run),
    Section("time_decode", "decode attention", 30, timing.COLUMNS, time_attention.run_decode, True),
    Section("time_ragged", "prompt attention", 25, timing.COLUMNS, time_attention.run_ragged, True),
    Section("time_mla", "latent attention", 20, timing.COLUMNS, time_attention.run_mla, True),
    Section("time_kv_write", "KV writes", 15, timing.COLUMNS, time_others.run_kv_write, True),
    Section("time_blocks", "block moves", 15, timing.COLUMNS, time_others.run_blocks, True),
    Section("time_sampling", "sampling", 25, timing.COLUMNS, time_others.run_sampling, True),
    Section("time_grouped", "matmul by group", 25, timing.COLUMNS, time_matmul.run, True),
    Section("time_steps", "decode steps of whole models", 90, time_steps.COLUMNS, time_steps.run, True),
    Section("sweep", "best tiles, for tuning.json", 140, sweep.COLUMNS, sweep.run),
)
