# SPDX-License-Identifier: Apache-2.0
"""What the host decides: which rows compute what in the next step, and where their KV lies. No jax."""
