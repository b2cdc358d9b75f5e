# SPDX-License-Identifier: Apache-2.0
"""The size and the perplexity of a model by each way to quantize it: `python -m benchmarks.quantization MODEL`.

Tokens are scored as by benchmarks.quality: the second half of each chunk of 256, of the language reference that comes
with Python, or of --text. Weights and activations are float32 where they are not quantized. `NAME=FOLDER` adds a
quantized checkpoint, such as one that `jaxserve convert --quantize awq` wrote. Nothing is timed.
"""

import argparse
import gc
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import jax
import numpy as np

from benchmarks import arguments
from benchmarks.quality import CHUNK, UNSCORED, Passages, passages
from convert.gguf import folder as gguf
from jaxserve import LLM
from jaxserve.models.online import Online

KV = ("bfloat16", "int8", "fp8_e4m3", "fp8_e5m2")
TOGETHER = 4  # chunks that are scored at once


def measured(model: str, those: Passages, **settings: Any) -> tuple[float, float]:
    """The size of the weights in MiB, and the perplexity."""
    llm = LLM(
        model,
        dtype="float32",
        skip_tokenizer_init=True,
        max_model_len=2 * CHUNK,
        max_num_seqs=TOGETHER,
        num_blocks=TOGETHER * CHUNK // 8,
        warmup="none",
        **settings,
    )
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(llm.params))
    scores = llm.logprobs([list(ids) for ids in those.chunks])
    found = np.concatenate([each[UNSCORED - 1 :] for each in scores])
    assert len(found) == those.scored and np.isfinite(found).all()
    del llm
    gc.collect()
    return size / 2**20, math.exp(-float(np.mean(found, dtype=np.float64)))


def settings_of(model: str, checkpoints: Sequence[str]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    yield "float32", model, {}
    for method in get_args(Online.__value__):
        yield f"--quantization {method}", model, {"quantization": method}
    for each in checkpoints:
        name, _, folder = each.partition("=")
        yield name, folder, {}
    for dtype in KV:
        yield f"--kv-cache-dtype {dtype}", model, {"kv_cache_dtype": dtype}


def rows(model: str, checkpoints: Sequence[str], those: Passages, *, only: str) -> Iterator[str]:
    """A line for float32, and one for each other setting with `only` in its name."""
    plain = None
    for name, folder, settings in settings_of(model, checkpoints):
        if plain is None or only in name:
            size, found = measured(folder, those, **settings)
            plain = plain or found
            yield f"| {name} | {size:.1f} | {found:.3f} | {100 * (found / plain - 1):+.1f}% |"


def checkpoint(text: str) -> str:
    name, _, folder = text.partition("=")
    if not name or not Path(folder).is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=FOLDER, with a folder that exists")
    return text


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quantization", description="Measure size and perplexity of a model by each method."
    )
    parser.add_argument("model", type=Path, help="folder or .gguf file of an unquantized model")
    parser.add_argument(
        "checkpoints", type=checkpoint, nargs="*", metavar="NAME=FOLDER", help="quantized checkpoints of this model"
    )
    parser.add_argument("--chunks", type=arguments.whole, default=32, help="chunks of 256 tokens (default: 32)")
    parser.add_argument("--text", type=Path, help="file with the text (default: Python's reference)")
    parser.add_argument("--only", help="float32, and the settings with this in their name (default: all)")
    given = parser.parse_args()
    model = gguf.resolved(given.model.expanduser())
    those = passages(model, given.chunks, given.text)
    print(f"{those.scored:,} tokens are scored\n\n| setting | weights, MiB | perplexity | change |\n|---|---|---|---|")
    for line in rows(str(model), given.checkpoints, those, only=given.only or ""):
        print(line, flush=True)


if __name__ == "__main__":
    main()
