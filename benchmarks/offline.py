# SPDX-License-Identifier: Apache-2.0
"""Measures offline generation against transformers: `python -m benchmarks.offline --peer PYTHON [--json FILE]`.

A Llama with 110 million random parameters is written as a Hugging Face folder. Both sides load it as float32, each in
its own process, transformers in the Python that --peer names (one with torch and transformers; without it only jaxserve
is timed). Then, in interleaved rounds, both get the same prompts of equal length, so that nothing is padded, and
generate greedily; the first round is a warm-up. The results are the medians of the output tokens per second, their
interquartile range, the median of the ratio round by round, and how many sequences are identical (where two logits are
nearly equal, rounding decides, and the sequences diverge from there). Loading and compiling are not timed. Targets:
2.0, 1.7 and 1.5 times as fast with 1, 8 and 32 prompts.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks import arguments, facts

AIMS = {1: 2.0, 8: 1.7, 32: 1.5}
_ROOT = Path(__file__).parents[1]
_PEER = Path(__file__).parent / "peers" / "transformers_generate.py"


@dataclass(frozen=True)
class LlamaShape:
    vocab: int = 32_000
    hidden: int = 768
    width: int = 2048
    layers: int = 12
    heads: int = 12
    kv_heads: int | None = None  # None: as many as heads
    prompt: int = 64
    new: int = 64


TINY = LlamaShape(vocab=128, hidden=32, width=64, layers=2, heads=2, prompt=8, new=4)


@dataclass(frozen=True)
class OfflineResult:
    prompts: int
    ours: float  # output tokens per second
    ours_spread: float
    theirs: float | None
    theirs_spread: float | None
    ratio: float | None
    same: float | None  # share of sequences that are equal
    aim: float | None


class GeneratorProcess:
    """A child process that generates; its input and output are lines of JSON."""

    def __init__(self, command: Sequence[str]) -> None:
        self.process = subprocess.Popen(command, cwd=_ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.versions = self._line()

    def generate(self, prompts: list[list[int]], new: int) -> dict[str, Any]:
        assert self.process.stdin
        self.process.stdin.write(json.dumps({"prompts": prompts, "max_tokens": new}) + "\n")
        self.process.stdin.flush()
        answer = self._line()
        if [len(tokens) for tokens in answer["tokens"]] != [new] * len(prompts):
            raise SystemExit(
                f"error: {self.process.args} did not return {new} tokens for each of {len(prompts)} prompts"
            )
        return answer

    def _line(self) -> dict[str, Any]:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            self.close()
            raise SystemExit(f"error: {self.process.args} ended with code {self.process.returncode}; see its output")
        return json.loads(line)

    def close(self) -> None:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()


def make_checkpoint(folder: Path, shape: LlamaShape, seed: int) -> Path:
    """Writes a Llama with tied embeddings: config.json and model.safetensors, in float32 with random normal weights."""
    square, up = (shape.hidden, shape.hidden), (shape.width, shape.hidden)
    kv_heads = shape.kv_heads or shape.heads
    narrow = (shape.hidden // shape.heads * kv_heads, shape.hidden)
    layer = {f"self_attn.{name}_proj": square if name in "qo" else narrow for name in "qkvo"}
    layer |= {"mlp.gate_proj": up, "mlp.up_proj": up, "mlp.down_proj": (shape.hidden, shape.width)}
    layer |= {"input_layernorm": (shape.hidden,), "post_attention_layernorm": (shape.hidden,)}
    shapes = {"model.embed_tokens": (shape.vocab, shape.hidden), "model.norm": (shape.hidden,)}
    shapes |= {f"model.layers.{i}.{name}": size for i in range(shape.layers) for name, size in layer.items()}
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.width,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": shape.vocab,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    header: dict[str, Any] = {}
    end = 0
    for name, size in shapes.items():
        count = 4 * int(np.prod(size))
        header[f"{name}.weight"] = {"dtype": "F32", "shape": size, "data_offsets": [end, end + count]}
        end += count
    text = json.dumps(header).encode()
    rng = np.random.default_rng(seed)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for size in shapes.values():
            matrix = len(size) == 2
            values = 0.02 * rng.standard_normal(size, np.float32) if matrix else np.ones(size, np.float32)
            file.write(values.astype("<f4").tobytes())
    return folder


def prompts_of(shape: LlamaShape, count: int, seed: int) -> list[list[int]]:
    """Random ids, without the special tokens."""
    return np.random.default_rng((seed, count)).integers(3, shape.vocab, (count, shape.prompt)).tolist()


def _spread(values: Sequence[float]) -> float:
    ordered = sorted(values)
    return ordered[len(ordered) * 3 // 4] - ordered[len(ordered) // 4]


def measure(
    sides: Sequence[Any], shape: LlamaShape, *, counts: Sequence[int], rounds: int, seed: int
) -> list[OfflineResult]:
    """`sides`: jaxserve's and, if there is a peer, transformers'."""
    speeds: dict[int, list[list[float]]] = {count: [] for count in counts}
    same: dict[int, float] = {}
    for turn in range(rounds + 1):
        for count in counts:
            prompts = prompts_of(shape, count, seed)
            answers = [side.generate(prompts, shape.new) for side in sides]
            if turn == 0:  # warms up: compared, not timed
                first, last = answers[0]["tokens"], answers[-1]["tokens"]
                same[count] = statistics.mean(a == b for a, b in zip(first, last, strict=True))
            else:
                speeds[count].append([count * shape.new / answer["seconds"] for answer in answers])
    return [_row(count, speeds[count], same[count]) for count in counts]


def _row(count: int, speeds: list[list[float]], same: float) -> OfflineResult:
    ours = [each[0] for each in speeds]
    theirs = [each[1] for each in speeds if len(each) > 1]
    return OfflineResult(
        prompts=count,
        ours=statistics.median(ours),
        ours_spread=_spread(ours),
        theirs=statistics.median(theirs) if theirs else None,
        theirs_spread=_spread(theirs) if theirs else None,
        ratio=statistics.median(a / b for a, b in zip(ours, theirs, strict=True)) if theirs else None,
        same=same if theirs else None,
        aim=AIMS.get(count),
    )


def table(rows: Sequence[OfflineResult]) -> str:
    def cell(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    lines = [
        f"{'prompts':>8} {'jaxserve tok/s':>15} {'spread':>8} {'transformers':>13} {'spread':>8} {'ratio':>6} "
        f"{'target':>7} {'same':>5}"
    ]
    for row in rows:
        lines.append(
            f"{row.prompts:8} {row.ours:15.1f} {row.ours_spread:8.1f} {cell(row.theirs, '.1f'):>13} "
            f"{cell(row.theirs_spread, '.1f'):>8} {cell(row.ratio, '.2f'):>6} {cell(row.aim, '.1f'):>7} "
            f"{cell(row.same, '.0%'):>5}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.offline", description="Compare offline generation with transformers."
    )
    parser.add_argument(
        "--peer", type=arguments.python, metavar="PYTHON", help="a Python that has torch and transformers"
    )
    parser.add_argument("--concurrency", default="1,8,32", help="prompts at once")
    parser.add_argument("--json", type=arguments.file_to_write, metavar="FILE", help="also write the rows to FILE")
    parser.add_argument("--tiny", action="store_true", help="a toy model, to check that it runs")
    parser.add_argument("--rounds", type=arguments.whole, default=5, help="timed rounds (default: 5)")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and prompts (default: 0)")
    options = parser.parse_args()
    counts = [int(count) for count in options.concurrency.split(",")]
    shape = TINY if options.tiny else LlamaShape()
    jax.config.update("jax_platforms", "cpu")
    with tempfile.TemporaryDirectory() as temporary:
        folder = make_checkpoint(Path(temporary, "model"), shape, options.seed)
        length = str(shape.prompt + shape.new)
        module = "benchmarks.peers.jaxserve_generate"
        sides = [GeneratorProcess([sys.executable, "-m", module, str(folder), str(max(counts)), length])]
        try:
            if options.peer:
                sides.append(GeneratorProcess([options.peer, str(_PEER), str(folder)]))
            print(f"{facts.processor()}; {', '.join(f'{k} {v}' for side in sides for k, v in side.versions.items())}")
            rows = measure(sides, shape, counts=counts, rounds=options.rounds, seed=options.seed)
        finally:
            for side in sides:
                side.close()
    print(table(rows))
    if options.json:
        content = facts.collect() | {"processor": facts.processor(), "shape": asdict(shape), "rounds": options.rounds}
        content |= {"sides": [side.versions for side in sides], "rows": [asdict(row) for row in rows]}
        options.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
