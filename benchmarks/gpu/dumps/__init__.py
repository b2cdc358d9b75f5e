# SPDX-License-Identifier: Apache-2.0
"""Readers of the files that XLA and its profiler write: launch plans and traces."""
