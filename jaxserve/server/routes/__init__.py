# SPDX-License-Identifier: Apache-2.0
"""The HTTP routes, one file per route or group of related routes. table.py lists them."""
