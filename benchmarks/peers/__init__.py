# SPDX-License-Identifier: Apache-2.0
"""The sides of a comparison: child processes that answer each line of JSON on stdin with one on stdout."""
