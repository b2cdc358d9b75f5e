# SPDX-License-Identifier: Apache-2.0
"""The GPU run book: checks and times the kernels and the engine on this machine's GPU, and finds the best tile sizes.

    python -m benchmarks.gpu [--section NAME ...] [--seconds N] [--out DIR] [--seed N] [--size tiny] [--list]

It needs jax, numpy, flax, msgspec and tqdm. `engine_peer` compares with the engines that are installed: transformers
with torch, and vLLM. `--size tiny` runs every section with toy shapes on any backend.

    checks/   kernels and models against an oracle      engine/   the whole engine
    times/    kernels and model steps; the tile sweep   dumps/    readers of XLA's launch plans and traces
"""
