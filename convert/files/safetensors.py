# SPDX-License-Identifier: Apache-2.0
"""Lists the tensors of a checkpoint: names, dtypes, shapes and offsets, never the data.

A checkpoint is one safetensors or GGUF file, or a folder with model.safetensors, with an index and its shards, or with
one GGUF file. Any fault raises a one-line
CheckpointError that names the file, the tensor and what was expected. header.py parses the headers.
"""

import json
import os
import stat
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, cast

from convert.files import header
from convert.files.header import MalformedError, TensorInfo, quote
from convert.gguf.source import is_gguf
from jaxserve.errors import CheckpointError, one_line

__all__ = ["TensorInfo", "gguf_of", "read_checkpoint", "read_header", "read_index"]

MAX_HEADER = 100_000_000  # the format's own limit
MAX_INDEX = 32_000_000  # DeepSeek-V3 (91k tensors) has 9 MB

# Formats that are not supported, because they are pickles, which run code when opened.
_FOREIGN = {".bin", ".pt", ".pth", ".ckpt", ".pkl"}
_HINT_SAVE = "save the model as safetensors (save_pretrained does by default)"


def read_checkpoint(path: str | Path) -> dict[str, TensorInfo]:
    """Every tensor of a file, or of a folder with model.safetensors, an index and shards, or a GGUF file. The names are
    those in the file."""
    path = Path(path)
    if not _is_folder(path):
        return _read_gguf(path) if is_gguf(path) else read_header(path)
    single = path / "model.safetensors"
    if os.path.lexists(single):
        return read_header(single)
    index = path / "model.safetensors.index.json"
    if os.path.lexists(index):
        return _read_shards(index)
    if file := gguf_of(path):
        return _read_gguf(file)
    suffixes = {Path(name).suffix for name in _listing(path)}
    if ".safetensors" in suffixes:
        problem = "has neither model.safetensors nor model.safetensors.index.json"
        _fail(path, problem, "name one .safetensors file, or download the index too")
    if suffixes & _FOREIGN:
        _fail(path, "contains weights only in an unsupported format", _HINT_SAVE)
    _fail(path, "contains no safetensors checkpoint", "name a model folder or a .safetensors file")


def gguf_of(folder: Path) -> Path | None:
    """The folder's GGUF file, if it has one and no safetensors."""
    names = _listing(folder)
    found = [name for name in names if is_gguf(name)]
    return folder / found[0] if len(found) == 1 and not any(".safetensors" in name for name in names) else None


def _read_gguf(file: Path) -> dict[str, TensorInfo]:
    from convert.gguf import header

    return header.read(file).tensors


def read_header(path: str | Path) -> dict[str, TensorInfo]:
    """Every tensor of one safetensors file, in data order."""
    path = Path(path)
    if path.suffix.lower() in _FOREIGN:
        _fail(path, f"is a {path.suffix} file, not safetensors", _HINT_SAVE)
    with _open(path) as (file, size):
        if size < 8:
            _fail(path, f"is too short to be safetensors: {size} bytes, expected at least 8")
        length = int.from_bytes(file.read(8), "little")
        if length > MAX_HEADER:
            _fail(path, f"claims a header of {length} bytes, expected at most {MAX_HEADER}")
        if length > size - 8:
            _fail(path, f"claims a header of {length} bytes, but only {size - 8} bytes follow")
        text = file.read(length)
    if len(text) != length:
        _fail(path, f"changed while being read: {len(text)} header bytes, expected {length}")
    try:
        return header.parse(text, size=size, file=path)
    except MalformedError as error:
        _fail(path, str(error))


# -- folders


def _read_shards(index: Path) -> dict[str, TensorInfo]:
    weight_map = read_index(index)
    shards = {shard: read_header(index.parent / shard) for shard in sorted(set(weight_map.values()))}
    for name, shard in weight_map.items():
        if name not in shards[shard]:
            problem = f"tensor {quote(name)} is not in {quote(shard)}, where the index lists it"
            _fail(index, problem)
    tensors: dict[str, TensorInfo] = {}
    for shard, held in shards.items():
        for name, info in held.items():
            if weight_map.get(name) != shard:
                _fail(index, f"tensor {quote(name)} is in {quote(shard)}, but the index does not list it there")
            tensors[name] = info
    return tensors


def read_index(index: Path) -> dict[str, str]:
    """The shard of each tensor by the index: plain names of .safetensors files beside it."""
    with _open(index) as (file, size):
        if size > MAX_INDEX:
            _fail(index, f"has {size} bytes, expected at most {MAX_INDEX}")
        raw = file.read(MAX_INDEX)
    # An index contains two flat objects. Thousands of brackets are an attempt to make the parser recurse, or to build
    # objects twenty times the size of their text.
    if raw.count(b"[") + raw.count(b"{") > 1000:
        _fail(index, "has over 1000 brackets, expected two flat JSON objects")
    try:
        content: Any = json.loads(raw.decode(), object_pairs_hook=_unique)
    except MalformedError as error:
        _fail(index, str(error))
    except (ValueError, RecursionError):
        _fail(index, "is not valid JSON")
    weight_map = cast(Any, content).get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        _fail(index, "must be a JSON object with a non-empty object weight_map")
    for name, shard in cast(dict[str, object], weight_map).items():
        # A shard is in the same folder as its index. Anything other than a plain file name is rejected, on every
        # platform, before the file system is accessed.
        plain = isinstance(shard, str) and shard.isprintable() and not set(shard) & set("/\\:")
        if not plain or not cast(str, shard).endswith(".safetensors"):
            problem = f"weight_map maps tensor {quote(name)} to {quote(str(shard))}"
            _fail(index, f"{problem}, expected the plain name of a .safetensors file beside it")
    return cast(dict[str, str], weight_map)


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise MalformedError(f"names {quote(twice)} twice")
    return found


# -- the file system


@contextmanager
def _open(path: Path) -> Generator[tuple[BinaryIO, int]]:
    """The open file and its size. Rejects anything but a regular file first: opening a pipe could block forever."""
    with _os_errors(path):
        if not stat.S_ISREG(os.stat(path).st_mode):
            _fail(path, "is not a regular file", "name a model folder or a .safetensors file")
        with open(path, "rb") as file:
            yield file, os.fstat(file.fileno()).st_size


def _is_folder(path: Path) -> bool:
    with _os_errors(path):
        return stat.S_ISDIR(os.stat(path).st_mode)


def _listing(path: Path) -> list[str]:
    with _os_errors(path):
        return os.listdir(path)


@contextmanager
def _os_errors(path: Path) -> Generator[None]:
    if "\0" in str(path):
        _fail(path, "is not a file name", "name a model folder or a .safetensors file")
    try:
        yield
    except OSError as error:
        reason = (error.strerror or type(error).__name__).lower()
        _fail(path, f"cannot be read ({reason})", "check the path and its permissions")


def _fail(path: Path, problem: str, hint: str = "if it is a safetensors file, download it again") -> NoReturn:
    raise CheckpointError(f"{one_line(str(path), limit=1000)}: {problem}", hint) from None
