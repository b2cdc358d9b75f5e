# SPDX-License-Identifier: Apache-2.0
"""The golden cases: what transformers computed, and the checkpoints it used.

golden = read("llama-gqa-tied")
write_checkpoint("llama-gqa-tied", folder)  # what the hub would hold; load and run it
assert close(mine, golden.logits)
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tests.golden import weights

DATA = Path(__file__).parent / "data"
TOKENIZERS = DATA / "tokenizers"


@dataclass(frozen=True)
class Golden:
    case: str
    seed: int
    config: dict[str, Any]  # config.json as the hub would hold it
    tensors: dict[str, tuple[int, ...]]  # names and shapes as the hub would hold them
    rules: weights.Rules
    prompt: tuple[int, ...]
    logits: np.ndarray  # [prompt, vocab], float32
    greedy_prompt: tuple[int, ...]
    greedy: tuple[int, ...]  # what follows greedy_prompt
    transformers: str

    def tensor(self, name: str) -> np.ndarray:
        """One weight in float32, exact in bfloat16 too."""
        return weights.tensor(self.seed, name, self.tensors[name], self.rules)


def cases() -> list[str]:
    return sorted(path.stem for path in DATA.glob("*.npz"))


def _content(case: str) -> dict[str, Any]:
    return json.loads((DATA / f"{case}.json").read_text())


def config(case: str) -> dict[str, Any]:
    """config.json alone."""
    return _content(case)["config"]


def read(case: str) -> Golden:
    content = _content(case)
    with np.load(DATA / f"{case}.npz") as arrays:
        logits = arrays["logits"]
    return Golden(
        case=content["case"],
        seed=content["seed"],
        config=content["config"],
        tensors={name: tuple(shape) for name, shape in content["tensors"].items()},
        rules=weights.Rules(**content["rules"]),
        prompt=tuple(content["prompt"]),
        logits=logits,
        greedy_prompt=tuple(content["greedy_prompt"]),
        greedy=tuple(content["greedy"]),
        transformers=content["transformers"],
    )


def write_checkpoint(case: str, folder: str | Path, dtype: str = "float32", shards: int = 1) -> Path:
    """config.json and the weights, in one file or in shards with an index. Returns the folder."""
    golden = read(case)
    tensors = {name: golden.tensor(name) for name in golden.tensors}
    return write_folder(folder, golden.config, tensors, dtype, shards)


def write_folder(
    folder: str | Path, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray], dtype: str, shards: int
) -> Path:
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    if shards == 1:
        write_safetensors(folder / "model.safetensors", tensors, dtype)
        return folder
    names = sorted(tensors)
    weight_map: dict[str, str] = {}
    size = 0
    for part in range(shards):
        file = f"model-{part + 1:05}-of-{shards:05}.safetensors"
        held = names[len(names) * part // shards : len(names) * (part + 1) // shards]
        size += write_safetensors(folder / file, {name: tensors[name] for name in held}, dtype)
        weight_map |= dict.fromkeys(held, file)
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    return folder


def write_safetensors(file: Path, tensors: Mapping[str, np.ndarray], dtype: str) -> int:
    """Returns the bytes of data. numpy has no bfloat16, so the file is put together here."""
    code = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}[dtype]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    parts: list[bytes] = []
    end = 0
    for name in sorted(tensors):
        data = _encode(tensors[name], dtype)
        header[name] = {"dtype": code, "shape": list(tensors[name].shape), "data_offsets": [end, end + len(data)]}
        end += len(data)
        parts.append(data)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(parts))
    return end


def _encode(values: np.ndarray, dtype: str) -> bytes:
    values = np.ascontiguousarray(values, np.float32)
    if dtype == "bfloat16":
        return (values.view(np.uint32) >> np.uint32(16)).astype("<u2").tobytes()
    return values.astype("<f4" if dtype == "float32" else "<f2").tobytes()
