# SPDX-License-Identifier: Apache-2.0
"""The sections of the run book, in the order in which they run. A share is about a section's seconds on one H200."""

from benchmarks.gpu.book import Section
from benchmarks.gpu.checks import attention as check_attention
from benchmarks.gpu.checks import hazards
from benchmarks.gpu.checks import matmul as check_matmul
from benchmarks.gpu.checks import models as check_models
from benchmarks.gpu.checks import quant as check_quant
from benchmarks.gpu.checks import sampling as check_sampling
from benchmarks.gpu.checks import writes as check_writes
from benchmarks.gpu.engine import gap as engine_gap
from benchmarks.gpu.engine import graphs as engine_graphs
from benchmarks.gpu.engine import separate, throughput
from benchmarks.gpu.times import attention as time_attention
from benchmarks.gpu.times import machine, sweep, timing
from benchmarks.gpu.times import matmul as time_matmul
from benchmarks.gpu.times import quant as time_quant
from benchmarks.gpu.times import sampling as time_sampling
from benchmarks.gpu.times import steps as time_steps
from benchmarks.gpu.times import writes as time_writes

SECTIONS = (
    Section("machine", "copy bandwidth, bf16 matmul rate, state of the GPU", 15, machine.COLUMNS, machine.run),
    Section("check_paged", "paged attention against float64", 60, check_attention.COLUMNS, check_attention.run_paged),
    Section("check_mla", "latent attention against float64", 20, check_attention.COLUMNS, check_attention.run_mla),
    Section("check_kv_write", "KV writes, exact", 15, check_writes.WRITE_COLUMNS, check_writes.run_kv_write),
    Section("check_blocks", "block moves, exact", 10, check_writes.BLOCK_COLUMNS, check_writes.run_blocks),
    Section("check_sampling", "sampling against float64", 60, check_sampling.COLUMNS, check_sampling.run),
    Section("check_grouped", "grouped matmul against float64", 45, check_matmul.COLUMNS, check_matmul.run),
    Section("check_quant", "products with 4 and 8 bits against float64", 40, check_quant.COLUMNS, check_quant.run),
    Section("check_models", "golden checkpoints against transformers", 60, check_models.COLUMNS, check_models.run),
    Section("hazards", "races, far offsets, grid limits, CUDA graphs, donation", 50, hazards.COLUMNS, hazards.run),
    Section("engine_decode", "whole decode steps", 70, throughput.DECODE_COLUMNS, throughput.run_decode, True),
    Section("engine_gap", "idle time between steps", 20, engine_gap.COLUMNS, engine_gap.run),
    Section("engine_offline", "many requests", 75, throughput.OFFLINE_COLUMNS, throughput.run_offline, True),
    Section("engine_prefill", "whole prompts", 15, throughput.PREFILL_COLUMNS, throughput.run_prefill, True),
    Section("engine_graphs", "the engine's programs as CUDA graphs", 30, engine_graphs.COLUMNS, engine_graphs.run),
    Section("engine_peer", "other engines on this GPU", 60, separate.PEER_COLUMNS, separate.run_peer),
    Section("engine_start", "cold and warm start", 150, separate.START_COLUMNS, separate.run_start),
    Section("engine_flags", "XLA flags, eight layers", 130, separate.FLAG_COLUMNS, separate.run_flags),
    Section("time_decode", "decode attention", 30, timing.COLUMNS, time_attention.run_decode, True),
    Section("time_ragged", "prompt attention", 25, timing.COLUMNS, time_attention.run_ragged, True),
    Section("time_mla", "latent attention", 20, timing.COLUMNS, time_attention.run_mla, True),
    Section("time_kv_write", "KV writes", 15, timing.COLUMNS, time_writes.run_kv_write, True),
    Section("time_blocks", "block moves", 15, timing.COLUMNS, time_writes.run_blocks, True),
    Section("time_sampling", "sampling", 25, timing.COLUMNS, time_sampling.run, True),
    Section("time_grouped", "grouped matmul", 25, timing.COLUMNS, time_matmul.run, True),
    Section("time_quant", "products with 4 and 8 bits", 40, timing.COLUMNS, time_quant.run, True),
    Section("time_steps", "decode steps of whole models", 90, time_steps.COLUMNS, time_steps.run, True),
    Section("sweep", "best tiles, for tuning.json", 140, sweep.COLUMNS, sweep.run),
)
