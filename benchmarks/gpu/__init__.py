# SPDX-License-Identifier: Apache-2.0
"""The GPU run book: is every kernel right on the GPU at hand, how fast is it, which tiles are best; and the engine.

    python -m benchmarks.gpu [--section NAME ...] [--seconds N] [--out DIR] [--seed N] [--size tiny] [--list]

The kernels' sections need jax, numpy and `pallas_kernels`, nothing else. `check_models`, `time_steps` and those that
begin with `engine_` run our models and our engine: flax, msgspec and tqdm too. `engine_peer` uses torch and
transformers where they are. `--size tiny` runs every section with toy shapes on any backend.
"""
