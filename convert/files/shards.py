# SPDX-License-Identifier: Apache-2.0
"""Writes safetensors checkpoints, a few tensors at a time. Sizes are known first, so that a header can precede them."""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from convert.files.header import BITS

SHARD = 5 * 10**9  # bytes of a file, as transformers splits checkpoints

type Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Planned:
    """A tensor to write; `dtype` is a name in headers."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape) * BITS[self.dtype] // 8


@dataclass(frozen=True)
class Entry:
    """Tensors that are made together, by name, when it is their turn."""

    tensors: Sequence[Planned]
    make: Callable[[], Mapping[str, Array]]

    @property
    def size(self) -> int:
        return sum(each.size for each in self.tensors)


def write(folder: Path, entries: Sequence[Entry]) -> None:
    """model.safetensors, or an index and its shards."""
    shards = list(_shards(entries))
    if len(shards) == 1:
        _write_file(folder / "model.safetensors", shards[0])
        return
    places: dict[str, str] = {}
    for i, shard in enumerate(shards, 1):
        file = f"model-{i:05}-of-{len(shards):05}.safetensors"
        _write_file(folder / file, shard)
        places |= {tensor.name: file for entry in shard for tensor in entry.tensors}
    index = {"metadata": {"total_size": sum(entry.size for entry in entries)}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")


def _shards(entries: Sequence[Entry]) -> Iterator[list[Entry]]:
    shard, size = list[Entry](), 0
    for entry in entries:
        if shard and size + entry.size > SHARD:
            yield shard
            shard, size = [], 0
        shard.append(entry)
        size += entry.size
    yield shard


def _write_file(file: Path, entries: Sequence[Entry]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in (each for entry in entries for each in entry.tensors):
        offsets = [end, end := end + tensor.size]
        header[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for entry in entries:
            made = entry.make()
            for tensor in entry.tensors:
                array = made[tensor.name]
                assert array.shape == tensor.shape and array.nbytes == tensor.size, (tensor, array.dtype, array.shape)
                out.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
