# SPDX-License-Identifier: Apache-2.0
"""Host decisions: what each row computes in the next step, and which KV blocks it uses. No jax."""
