# SPDX-License-Identifier: Apache-2.0
"""A file for each route or few that belong together; table.py lists them."""
