# SPDX-License-Identifier: Apache-2.0
"""The GPU run book: is every kernel right on the GPU at hand, how fast is it, which tiles are best.

    python -m benchmarks.gpu [--section NAME ...] [--seconds N] [--out DIR] [--seed N] [--size tiny] [--list]

Needs jax, numpy and `pallas_kernels`, nothing else. `--size tiny` runs every section with toy shapes on any backend.
"""
