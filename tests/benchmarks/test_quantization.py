# SPDX-License-Identifier: Apache-2.0
"""Two rows of `python -m benchmarks.quantization`, of the demo model."""

import argparse
from pathlib import Path

import pytest

from benchmarks import quality, quantization
from jaxserve import demo


def test_rows_of_float32_and_of_one_method() -> None:
    model = demo.FOLDER
    those = quality.passages(model, 1, None)
    [plain, rounded] = quantization.rows(str(model), (), those, only="fp8_per_channel")
    assert plain.startswith("| float32 | 6.3 | ") and plain.endswith(" | +0.0% |")
    assert rounded.startswith("| --quantization fp8_per_channel | ")
    perplexities = [float(row.split("|")[3]) for row in (plain, rounded)]
    assert perplexities[0] != perplexities[1] and perplexities[1] == pytest.approx(perplexities[0], rel=0.05)


def test_every_method_and_kv_dtype_has_a_row(tmp_path: Path) -> None:
    names = [name for name, _, _ in quantization.settings_of("m", [f"mine={tmp_path}"])]
    assert {"float32", "mine", "--quantization int4", "--kv-cache-dtype fp8_e5m2"} <= set(names)
    assert quantization.checkpoint(f"mine={tmp_path}") == f"mine={tmp_path}"
    with pytest.raises(argparse.ArgumentTypeError, match="with a folder that exists"):
        quantization.checkpoint("mine=/nowhere")
