# SPDX-License-Identifier: Apache-2.0
"""What CPUs run: each op in jax.numpy, tuned for XLA's CPU compiler. A module has the name of the op's own module.

The ops call these functions after they have checked the arguments. Devices that are neither a CPU nor a GPU run this
code too. For code that is meant to be read, and to be tested against, see `pallas_kernels.reference`.
"""
