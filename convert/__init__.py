# SPDX-License-Identifier: Apache-2.0
"""From published checkpoints to ours: download, check, load into shardings, convert."""
