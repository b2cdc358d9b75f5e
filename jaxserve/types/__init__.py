# SPDX-License-Identifier: Apache-2.0
"""What goes into an engine and what comes out of it. Plain data: no jax, no tokenizer."""
