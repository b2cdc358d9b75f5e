# SPDX-License-Identifier: Apache-2.0
"""The engine: requests in, tokens out. Host files say what to run, device files run it."""
