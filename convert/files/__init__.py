# SPDX-License-Identifier: Apache-2.0
"""Model files on disk and on the Hugging Face Hub: finds, validates, reads and writes them. Imports no jax."""
