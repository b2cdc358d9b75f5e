# SPDX-License-Identifier: Apache-2.0
"""The ops of a language-model server: Pallas kernels for GPUs, and jax.numpy code tuned for CPUs behind the same calls.

Import the op's module: `from pallas_kernels.paged_attention import paged_attention`. The package depends on jax and
numpy only. README.md shows every op with an example.
"""
