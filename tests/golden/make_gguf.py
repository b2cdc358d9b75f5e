# SPDX-License-Identifier: Apache-2.0
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
"""Records the logits that transformers computes with the golden GGUF files, which it decodes by itself.

`make golden-gguf` runs it, in a venv with torch.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM

from tests.golden import gguf_cases

SAME = 2e-5  # of the spread: what another processor may differ by


def main() -> int:
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    transformers.logging.set_verbosity_error()
    gguf_cases.DATA.mkdir(exist_ok=True)
    for name in gguf_cases.CASES:
        with tempfile.TemporaryDirectory() as folder:
            gguf_cases.write(name, Path(folder) / "model.gguf")
            model = AutoModelForCausalLM.from_pretrained(folder, gguf_file="model.gguf", dtype=torch.float32)
            logits = model(torch.tensor([gguf_cases.PROMPT])).logits[0].numpy()
        place = gguf_cases.DATA / f"{name}.npz"
        same = place.exists() and np.abs(gguf_cases.logits(name) - logits).max() < SAME * logits.std()
        if not same:
            np.savez_compressed(place, logits=logits)
        print(f"{name:24} spread {logits.std():.2f}  {'same' if same else 'written'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
