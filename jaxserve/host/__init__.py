# SPDX-License-Identifier: Apache-2.0
"""Runs an engine in this process, in a thread, or in a child process. May use jax."""
