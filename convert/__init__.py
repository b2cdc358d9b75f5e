# SPDX-License-Identifier: Apache-2.0
"""From published checkpoints to ours. Today: what a safetensors checkpoint holds."""
