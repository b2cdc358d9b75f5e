# SPDX-License-Identifier: Apache-2.0
"""An engine in a child process, and the way to it."""
