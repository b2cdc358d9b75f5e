# SPDX-License-Identifier: Apache-2.0
"""Ops of a language-model server as Pallas GPU kernels, each with a twin in plain jax.numpy that CPUs run.

Import the op's module: `from pallas_kernels.paged_attention import paged_attention`. Depends on jax and numpy only.
"""
