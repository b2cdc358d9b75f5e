# SPDX-License-Identifier: Apache-2.0
"""Sections that check the kernels and whole models against an oracle."""
