# SPDX-License-Identifier: Apache-2.0
"""What a request may ask of sampling beyond temperature, top-k, top-p and min-p."""
