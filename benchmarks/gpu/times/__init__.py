# SPDX-License-Identifier: Apache-2.0
"""Sections that time single kernels and model steps, and search for the best tile sizes."""
