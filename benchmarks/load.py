# SPDX-License-Identifier: Apache-2.0
"""Measures loading a model against reading its files: `python -m benchmarks.load [--gb 1] [--json FILE]`.

A Llama-shaped bfloat16 checkpoint is created in a temporary folder and converted. Then, in interleaved rounds of one
process with warm file caches, the files of each form are read into fresh memory by one thread, and the model is loaded
from them onto this CPU: as float32, the default there and twice the bytes, and as bfloat16. The results are the ratio
of the medians (target: at most 2) and the growth of the process beyond the parameters, in multiples of the largest
tensor (target: at most 1.1).
"""

import argparse
import ctypes
import gc
import json
import os
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks import arguments, facts
from convert import load, orbax

RATIO_AIM, MEMORY_AIM = 2.0, 1.1
VOCAB = 32_000


@dataclass(frozen=True)
class LoadingResult:
    form: str
    dtype: str
    file_gb: float
    read_s: float
    load_s: float
    ratio: float
    gb_per_s: float  # of the files
    params_gb: float
    largest_gb: float
    extra_gb: float  # the process's peak beyond its memory before and the parameters
    extra_in_largest: float


def make_checkpoint(folder: Path, gb: float, seed: int) -> Path:
    """Writes about `gb` GB of bfloat16 weights into one file."""
    hidden = 2048 if gb >= 0.5 else 256
    width, heads = hidden * 11 // 4, hidden // 128
    layer = {"input_layernorm": (hidden,), "post_attention_layernorm": (hidden,)}
    layer |= {f"self_attn.{name}_proj": (hidden, hidden) for name in "qo"}
    layer |= {f"self_attn.{name}_proj": (hidden // 2, hidden) for name in "kv"}
    layer |= {"mlp.gate_proj": (width, hidden), "mlp.up_proj": (width, hidden), "mlp.down_proj": (hidden, width)}
    shapes = {"model.embed_tokens": (VOCAB, hidden), "lm_head": (VOCAB, hidden), "model.norm": (hidden,)}
    fixed, each = (sum(map(np.prod, part.values())) for part in (shapes, layer))
    layers = max(1, round((gb * 1e9 / 2 - fixed) / each))
    shapes |= {f"model.layers.{i}.{name}": shape for i in range(layers) for name, shape in layer.items()}
    folder.mkdir()
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 2,
        "vocab_size": VOCAB,
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(config))
    header: dict[str, Any] = {}
    end = 0
    for name, shape in shapes.items():
        size = 2 * int(np.prod(shape))
        header[f"{name}.weight"] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    rng = np.random.default_rng(seed)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for shape in shapes.values():
            values = rng.standard_normal(int(np.prod(shape)), np.float32)
            file.write((values.view(np.uint32) >> np.uint32(16)).astype("<u2").tobytes())
    return folder


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the data, in either form."""
    stored = (folder / "params").glob("*/[0-9]*") if orbax.is_converted(folder) else folder.glob("*.safetensors")
    return sorted(stored)


def read_plainly(files: list[Path]) -> None:
    held: list[np.ndarray] = []  # kept in memory, like a model's parameters
    for path in files:
        held.append(np.empty(path.stat().st_size, np.uint8))
        into = memoryview(held[-1])
        with path.open("rb", buffering=0) as file:
            while into:
                into = into[file.readinto(into) :]


def seconds(action: Callable[[], object], memory: int = 0) -> float:
    """The seconds of a call that needs `memory` bytes. A virtual machine may first have to request them from its host,
    which can take longer than the call (0.25 to 1.5 s for 2 GB), so they are used once before the clock starts."""
    gc.collect()
    np.empty(memory, np.uint8).fill(1)
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def _memory(field: str) -> int:
    content = re.search(rf"^{field}:\s+(\d+)", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert content
    return int(content[1]) * 1024


def growth(action: Callable[[], Any]) -> tuple[int, Any]:
    """The peak growth of the process's memory during `action`, and its result."""
    gc.collect()  # JAX holds the host buffers of deleted arrays until then
    ctypes.CDLL(None).malloc_trim(0)  # and the C library holds freed memory
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _memory("VmRSS")
    result = action()
    return _memory("VmHWM") - before, result


def measure(folder: Path, form: str, dtypes: list[str], rounds: int) -> list[LoadingResult]:
    files = weight_files(folder)
    calls = [lambda: read_plainly(files)]
    calls += [lambda dtype=dtype: load.load_model(folder, dtype=dtype) for dtype in dtypes]
    size = sum(path.stat().st_size for path in files)
    times = [[seconds(call, 2 * size) for call in calls] for _ in range(rounds + 1)][1:]  # the first warms the caches
    read_s, *load_s = (statistics.median(column) for column in zip(*times, strict=True))
    rows: list[LoadingResult] = []
    for dtype, took in zip(dtypes, load_s, strict=True):
        grown, (_, params) = growth(lambda dtype=dtype: load.load_model(folder, dtype=dtype))
        sizes = [leaf.nbytes for leaf in jax.tree.leaves(params)]
        extra = grown - sum(sizes)
        rows.append(
            LoadingResult(
                form=form,
                dtype=dtype,
                file_gb=size / 1e9,
                read_s=read_s,
                load_s=took,
                ratio=took / read_s,
                gb_per_s=size / 1e9 / took,
                params_gb=sum(sizes) / 1e9,
                largest_gb=max(sizes) / 1e9,
                extra_gb=extra / 1e9,
                extra_in_largest=extra / max(sizes),
            )
        )
        del params
    return rows


def convert(source: Path, place: Path) -> dict[str, float]:
    place.mkdir()
    plan = load.open_model(source)
    grown = 0

    def write() -> None:
        nonlocal grown
        grown, _ = growth(lambda: orbax.write(plan, place, source={}))

    took = seconds(write)
    return {"seconds": took, "gb_per_s": plan.bytes / 1e9 / took, "grown_gb": grown / 1e9}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.load", description="Compare loading a checkpoint with reading its files."
    )
    parser.add_argument("--gb", type=arguments.positive, default=1.0, help="size of the checkpoint")
    parser.add_argument("--json", type=arguments.file_to_write, metavar="FILE", help="also write the rows to FILE")
    parser.add_argument("--dir", type=Path, help="parent of the temporary folder")
    parser.add_argument("--rounds", type=arguments.whole, default=9, help="timed rounds (default: 9)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights (default: 0)")
    options = parser.parse_args()
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # about PyTorch, which is not needed
    jax.config.update("jax_platforms", "cpu")
    with tempfile.TemporaryDirectory(dir=options.dir) as temporary:
        source, place = Path(temporary, "source"), Path(temporary, "converted")
        make_checkpoint(source, options.gb, options.seed)
        converting = convert(source, place)
        print(
            f"convert: {converting['seconds']:.1f} s, {converting['gb_per_s']:.2f} GB/s to disk, "
            f"at most {converting['grown_gb']:.2f} GB of memory, Orbax itself included"
        )
        print(
            f"{'form':12} {'dtype':9} {'file GB':>8} {'read s':>8} {'load s':>8} {'ratio':>6} {'target':>7} "
            f"{'GB/s':>6} {'params GB':>10} {'largest GB':>11} {'extra/largest':>14} {'target':>7}"
        )
        rows: list[LoadingResult] = []
        for folder, form in ((source, "safetensors"), (place, "converted")):
            for row in measure(folder, form, ["float32", "bfloat16"], options.rounds):
                rows.append(row)
                print(
                    f"{row.form:12} {row.dtype:9} {row.file_gb:8.2f} {row.read_s:8.3f} {row.load_s:8.3f} "
                    f"{row.ratio:6.2f} {RATIO_AIM:7.1f} {row.gb_per_s:6.2f} {row.params_gb:10.2f} "
                    f"{row.largest_gb:11.3f} {row.extra_in_largest:14.3f} {MEMORY_AIM:7.1f}",
                    flush=True,
                )
    if options.json:
        content = facts.collect() | {"processor": facts.processor(), "rounds": options.rounds, "convert": converting}
        options.json.write_text(json.dumps(content | {"rows": [asdict(row) for row in rows]}, indent=1) + "\n")


if __name__ == "__main__":
    main()
