# SPDX-License-Identifier: Apache-2.0
"""Sharding of arrays and work over devices."""
