# SPDX-License-Identifier: Apache-2.0
"""Connections: who may ask, what they may cost, and where the server listens."""
