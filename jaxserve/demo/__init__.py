# SPDX-License-Identifier: Apache-2.0
"""The paths of the demo models in the package: a toy model of one million parameters and a draft of a tenth of that.

Both are Hugging Face folders with the same tokenizer, made by `python -m benchmarks.demo.train`.
"""

from pathlib import Path

FOLDER = Path(__file__).parent / "model"
DRAFT_FOLDER = Path(__file__).parent / "draft"  # for speculative decoding: proposes tokens that the model verifies
