# SPDX-License-Identifier: Apache-2.0
"""Per-request sampling parameters on the devices: packed columns, and controls such as penalties and biases."""
