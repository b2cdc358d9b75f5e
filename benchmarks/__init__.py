# SPDX-License-Identifier: Apache-2.0
"""What is measured and not tested: `python -m benchmarks.NAME`."""
