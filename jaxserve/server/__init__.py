# SPDX-License-Identifier: Apache-2.0
"""The OpenAI-compatible server: HTTP in this process, the engine in a child process. Nothing here imports jax."""
