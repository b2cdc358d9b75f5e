# SPDX-License-Identifier: Apache-2.0
"""From an engine's outputs to the bodies and streams that clients get."""
