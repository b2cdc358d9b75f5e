# SPDX-License-Identifier: Apache-2.0
"""The trainer of the demo models: their text, their tokenizer, and the training."""
