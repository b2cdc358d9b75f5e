# SPDX-License-Identifier: Apache-2.0
"""Programs that measure jaxserve, run as `python -m benchmarks.NAME`; README.md lists them and their results."""
