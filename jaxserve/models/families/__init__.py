# SPDX-License-Identifier: Apache-2.0
"""One page per family: `spec(config)` and WEIGHTS, the names its checkpoints use."""
