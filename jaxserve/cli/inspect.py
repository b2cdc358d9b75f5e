# SPDX-License-Identifier: Apache-2.0
"""`jaxserve inspect`: lists the tensors of a checkpoint. It reads only headers, so even 100 GB take a moment."""

import json as json_module
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from convert.files.safetensors import TensorInfo, read_checkpoint
from jaxserve.errors import one_line
from jaxserve.flags.setting import Setting


@dataclass(frozen=True)
class Inspect:
    """List the tensors of a checkpoint."""

    path: Annotated[Path, Setting("A .safetensors or .gguf file, or a model folder.", given_as="word")]
    json: Annotated[bool, Setting("Print one JSON object instead of a table.")] = False

    def run(self) -> None:
        tensors = read_checkpoint(self.path)
        parameters: Counter[str] = Counter()
        for info in tensors.values():
            parameters[info.dtype] += math.prod(info.shape)
        total = sum(info.stop - info.start for info in tensors.values())
        if self.json:
            rows = [_row(name, info) for name, info in tensors.items()]
            print(json_module.dumps({"tensors": rows, "bytes": total, "parameters": parameters}))
        else:
            _print_table(tensors, parameters=parameters, total=total)


def _row(name: str, info: TensorInfo) -> dict[str, object]:
    return {
        "name": name,
        "dtype": info.dtype,
        "shape": info.shape,
        "bytes": info.stop - info.start,
        "file": info.file.name,
    }


def _print_table(tensors: Mapping[str, TensorInfo], *, parameters: Mapping[str, int], total: int) -> None:
    for name, info in tensors.items():
        shape = "x".join(map(str, info.shape)) or "scalar"
        size, file = info.stop - info.start, one_line(info.file.name)
        print(f"{one_line(name):60} {info.dtype:8} {shape:>16} {size:>14,}  {file}")
    files = len({info.file for info in tensors.values()})
    counts = ", ".join(f"{count:,} {dtype}" for dtype, count in sorted(parameters.items()))
    print(f"{len(tensors):,} tensors in {files} file{'s' * (files != 1)}, {total:,} bytes")
    print(f"parameters: {counts or 'none'}")
