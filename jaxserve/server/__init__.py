# SPDX-License-Identifier: Apache-2.0
"""The OpenAI-compatible server: HTTP in this process, the engine in a child of it. Nothing here imports jax."""
