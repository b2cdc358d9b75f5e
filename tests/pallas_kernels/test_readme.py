# SPDX-License-Identifier: Apache-2.0
"""The examples of pallas_kernels/README.md run in order, as one program, and no op is missing."""

import re
from pathlib import Path
from typing import Any

import pallas_kernels

README = Path(pallas_kernels.__file__).with_name("README.md")


def test_the_examples_run() -> None:
    text = README.read_text()
    found: dict[str, Any] = {}
    examples = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert len(examples) >= 7
    for example in examples:
        exec(compile(example, str(README), "exec"), found)
    assert found["out"].shape == (10, 32) and found["token"].shape == (1,)
    assert (found["k_pool"][7] == found["k_pool"][2]).all() and found["k_pool"][7].any()
    found["ragged"].check(tokens=4, blocks=8, block_size=16)
    assert len(text.splitlines()) < 120
