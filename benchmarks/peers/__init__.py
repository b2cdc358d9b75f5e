# SPDX-License-Identifier: Apache-2.0
"""One side of a comparison each: a child process that answers a line of JSON on stdin with one on stdout."""
