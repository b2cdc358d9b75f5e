# SPDX-License-Identifier: Apache-2.0
"""The demo models that come with the package: toys of a million parameters and of a tenth of it.

Both are Hugging Face folders and share one tokenizer. `python -m benchmarks.demo.train` made them. Here is only where
they are, so that asking costs nothing.
"""

from pathlib import Path

FOLDER = Path(__file__).parent / "model"
DRAFT_FOLDER = Path(__file__).parent / "draft"  # for speculative decoding: guesses what the model will say
