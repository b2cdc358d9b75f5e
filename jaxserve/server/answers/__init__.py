# SPDX-License-Identifier: Apache-2.0
"""Turns an engine's outputs into response bodies and streams."""
