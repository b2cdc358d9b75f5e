# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: download, validate, load into shardings, convert to the JAX-native form."""
