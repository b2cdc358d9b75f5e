# SPDX-License-Identifier: Apache-2.0
"""Who has an engine in hand: a thread, a child process, a program that calls it. All may use jax."""
