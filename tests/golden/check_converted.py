# SPDX-License-Identifier: Apache-2.0
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
"""Checks that compressed-tensors and transformers read quantized checkpoints as tests/quant/unpackers.py does.

    jaxserve convert MODEL OUT --quantize int4
    make .venv-golden/.installed
    .venv-golden/bin/python -m pip install compressed-tensors accelerate ml_dtypes
    .venv-golden/bin/python -m tests.golden.check_converted OUT...

The weights of every layer must be equal up to rounding to the checkpoint's dtype, and the model must run.
"""

import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from tests.quant import unpackers

NEAR = 2**-8  # of a value: that of bfloat16


def check(folder: Path) -> str:
    plain = unpackers.plain(folder)
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, quantization_config=CompressedTensorsConfig(run_compressed=False)
    )
    compared, worst = 0, 0.0
    for name, module in model.named_modules():
        wanted = plain.get(f"{name}.weight")
        if not isinstance(module, torch.nn.Linear) or wanted is None:
            continue
        found = module.weight.detach().double().numpy()
        off = np.abs(found - wanted) / np.maximum(np.abs(wanted), np.abs(wanted).max() * 1e-6)
        worst, compared = max(worst, float(off.max())), compared + 1
    if worst > NEAR or not compared:
        raise RuntimeError(f"{folder}: of {compared} matrices, values differ by {worst:.1e}")
    logits = model(input_ids=torch.tensor([[1, 2, 3, 4]])).logits
    if not torch.isfinite(logits).all():
        raise RuntimeError(f"{folder}: the logits are not finite")
    return f"{folder}: {compared} matrices are equal within {worst:.1e}"


def main() -> None:
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    transformers.logging.set_verbosity_error()
    for folder in sys.argv[1:]:
        print(check(Path(folder)), flush=True)


if __name__ == "__main__":
    main()
