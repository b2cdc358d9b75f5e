# SPDX-License-Identifier: Apache-2.0
"""How the demo models were made: their text, their vocabulary, their training."""
