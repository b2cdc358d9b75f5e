# SPDX-License-Identifier: Apache-2.0
"""Sections that measure the whole engine: throughput, idle time, CUDA graphs, startup, other engines."""
