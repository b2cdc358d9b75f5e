# SPDX-License-Identifier: Apache-2.0
"""Files of models, on disk and on the hub: found, checked, read, written. No jax."""
