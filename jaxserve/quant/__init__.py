# SPDX-License-Identifier: Apache-2.0
"""Weights that are stored as several arrays."""
