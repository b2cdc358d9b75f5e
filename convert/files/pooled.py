# SPDX-License-Identifier: Apache-2.0
"""The files that make embeddings, classes and scores of hidden states, which a conversion keeps beside the parameters.

modules.json, 1_Pooling/config.json, 2_Dense/model.safetensors, ...    of sentence-transformers, copied as they are
score/model.safetensors      the head of a sequence-classification model, which is not part of the decoder
"""

import json
import re
import shutil
from pathlib import Path

from convert.files.safetensors import TensorInfo, read_checkpoint

MODULES = "modules.json"
MODULE = re.compile(r"\d+_[A-Za-z]\w*/(?:config\.json|model\.safetensors)")
HEAD = "score.weight"
_HEAD_FOLDER = "score"


def is_converted(folder: Path) -> bool:
    return (folder / "spec.json").is_file()


def head_folder(folder: Path) -> Path:
    """Where the checkpoint with the classification head is."""
    return folder / _HEAD_FOLDER if is_converted(folder) else folder


def copy(folder: Path, made: Path) -> None:
    """Copy the modules of a model folder, or of a converted one, and its classification head, in the dtype of its
    checkpoint."""
    for path in sorted(folder.glob("*/*")):
        name = str(path.relative_to(folder))
        if MODULE.fullmatch(name) and path.is_file():
            (made / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(path, made / name)
    if (place := head_folder(folder)).is_dir() and HEAD in (tensors := read_checkpoint(place)):
        _write_head(tensors[HEAD], made / _HEAD_FOLDER)


def _write_head(info: TensorInfo, place: Path) -> None:
    place.mkdir()
    with info.file.open("rb") as source, (place / "model.safetensors").open("wb") as file:
        header = _header(info)
        file.write(len(header).to_bytes(8, "little") + header)
        source.seek(info.start)
        file.write(source.read(info.stop - info.start))


def _header(info: TensorInfo) -> bytes:
    entry = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": [0, info.stop - info.start]}
    text = json.dumps({HEAD: entry}).encode()
    return text + b" " * (-len(text) % 8)
