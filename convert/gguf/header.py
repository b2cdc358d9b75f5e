# SPDX-License-Identifier: Apache-2.0
"""Reads the header of a GGUF file: its key-value pairs, and where its tensors are. No tensor data is read.

The bytes are untrusted. Every length is compared with what is left of the file before anything is read or allocated,
and any fault raises a one-line CheckpointError that names the file.

File layout: magic, version, number of tensors, number of pairs; the pairs; the tensors' names, dimensions, formats and
offsets; then, aligned, the data. Numbers are little-endian, and dimensions are listed with the columns first.
"""

import math
import os
import stat
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import numpy as np

from convert.files.header import MalformedError, TensorInfo, quote
from convert.gguf.blocks import FORMATS, OTHERS
from jaxserve.errors import CheckpointError, one_line

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_HEADER = 256 << 20  # vocabularies of 256,000 tokens take 16 MB
MAX_ITEMS = 1 << 22  # of an array
MAX_NAME = 1000  # bytes
MAX_DIMS = 4

type Value = int | float | bool | str | list[Any]

_NUMBERS = {0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 10: "<u8", 11: "<i8", 12: "<f8"}
_BOOL, _STRING, _ARRAY = 7, 8, 9
_BY_NUMBER = {format.number: name for name, format in FORMATS.items()}
_HINT = "download the file again"


@dataclass(frozen=True)
class GgufHeader:
    file: Path
    pairs: dict[str, Value]
    tensors: dict[str, TensorInfo]  # in data order


def read(path: Path) -> GgufHeader:
    """The header of a GGUF file. Links are followed, so that messages name the file itself."""
    try:
        file = path.resolve(strict=True)
        if not stat.S_ISREG(os.stat(file).st_mode):
            fail(path, "is not a regular file", "name a .gguf file")
        with open(file, "rb") as opened:
            return _read(_Cursor(opened, os.fstat(opened.fileno()).st_size), file)
    except MalformedError as error:
        fail(path, str(error))
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links
        reason = (getattr(error, "strerror", None) or type(error).__name__).lower()
        fail(path, f"cannot be read ({reason})", "check the path and its permissions")


def fail(path: Path, problem: str, hint: str = _HINT) -> NoReturn:
    raise CheckpointError(f"{one_line(str(path), limit=1000)}: {problem}", hint) from None


class _Cursor:
    """The next bytes of the file's header."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file, self.size, self.at = file, size, 0
        self._end = min(size, MAX_HEADER)

    def take(self, count: int, what: str) -> bytes:
        if count > self._end - self.at:
            limit = "the file has" if self._end == self.size else "a header may have"
            raise MalformedError(f"{what} at byte {self.at} needs {count} bytes, but {limit} {self._end} in all")
        data = self._file.read(count)
        if len(data) != count:
            raise MalformedError("changed while it was read")
        self.at += count
        return data

    def number(self, dtype: str, what: str) -> Any:
        data = self.take(int(dtype[2:]), what)
        if dtype[1] == "f":
            # The shortest number that is the same float32: 1e-05, and not 9.999999747378752e-06.
            return float(str(np.frombuffer(data, "<f4")[0])) if len(data) == 4 else struct.unpack("<d", data)[0]
        return int.from_bytes(data, "little", signed=dtype[1] == "i")

    def text(self, what: str, limit: int = MAX_HEADER) -> str:
        count = self.number("<u8", what)
        if count > limit:
            raise MalformedError(f"{what} at byte {self.at} has {count} bytes, expected at most {limit}")
        data = self.take(count, what)
        try:
            return data.decode()
        except UnicodeDecodeError:
            raise MalformedError(f"{what} at byte {self.at - count} is not valid UTF-8") from None

    def count(self, what: str, *, least: int) -> int:
        """A number of items, each of which takes at least so many bytes."""
        count = self.number("<u8", f"the number of {what}")
        if count > (self._end - self.at) // least:
            raise MalformedError(f"claims {count} {what}, more than its {self.size} bytes can hold")
        return count


def _read(cursor: _Cursor, file: Path) -> GgufHeader:
    magic = cursor.take(4, "the magic number")
    if magic != MAGIC:
        raise MalformedError(f"is not a GGUF file: it begins with {magic!r}, expected {MAGIC!r}")
    version = cursor.number("<u4", "the version")
    if version not in VERSIONS:
        order = ", written on a big-endian machine" if version & 0xFFFF == 0 else ""
        raise MalformedError(f"has GGUF version {version}{order}, expected {' or '.join(map(str, VERSIONS))}")
    tensors = cursor.count("tensors", least=24)
    pairs: dict[str, Value] = {}
    for _ in range(cursor.count("key-value pairs", least=13)):
        key = cursor.text("a key", MAX_NAME)
        if key in pairs:
            raise MalformedError(f"has the key {quote(key)} twice")
        pairs[key] = _value(cursor, cursor.number("<u4", f"the type of {quote(key)}"), f"the value of {quote(key)}")
    found: dict[str, TensorInfo] = {}
    for _ in range(tensors):
        name = cursor.text("a tensor's name", MAX_NAME)
        if name in found:
            raise MalformedError(f"has the tensor {quote(name)} twice")
        found[name] = _tensor(cursor, f"tensor {quote(name)}", file)
    return GgufHeader(file, pairs, _placed(found, pairs, cursor))


def _value(cursor: _Cursor, kind: int, what: str) -> Value:
    if kind in _NUMBERS:
        return cursor.number(_NUMBERS[kind], what)
    if kind == _BOOL:
        return _bools(cursor.take(1, what), what)[0]
    if kind == _STRING:
        return cursor.text(what)
    if kind == _ARRAY:
        return _array(cursor, what)
    raise MalformedError(f"{what} has the unknown type {kind}")


def _array(cursor: _Cursor, what: str) -> list[Any]:
    kind, count = cursor.number("<u4", what), cursor.number("<u8", what)
    if count > MAX_ITEMS:
        raise MalformedError(f"{what} has {count} items, expected at most {MAX_ITEMS}")
    if kind in _NUMBERS:
        dtype = _NUMBERS[kind]
        return np.frombuffer(cursor.take(count * int(dtype[2:]), what), dtype).tolist()
    if kind == _BOOL:
        return _bools(cursor.take(count, what), what)
    if kind == _STRING:
        return [cursor.text(what) for _ in range(count)]
    raise MalformedError(f"{what} is an array of type {kind}, expected numbers or strings")


def _bools(data: bytes, what: str) -> list[bool]:
    if data.translate(None, b"\0\1"):
        raise MalformedError(f"{what} is not a boolean: it is neither 0 nor 1")
    return [bool(each) for each in data]


def _tensor(cursor: _Cursor, what: str, file: Path) -> TensorInfo:
    """With offsets from the beginning of the data."""
    rank = cursor.number("<u4", f"the number of dimensions of {what}")
    if not 1 <= rank <= MAX_DIMS:
        raise MalformedError(f"{what} has {rank} dimensions, expected 1 to {MAX_DIMS}")
    sizes = [cursor.number("<u8", f"the shape of {what}") for _ in range(rank)]
    number = cursor.number("<u4", f"the format of {what}")
    start = cursor.number("<u8", f"the offset of {what}")
    if number not in _BY_NUMBER:
        shown = OTHERS.get(number, f"number {number}")
        raise MalformedError(f"{what} is stored as {shown}, expected one of {', '.join(FORMATS)}")
    name = _BY_NUMBER[number]
    format = FORMATS[name]
    if not all(sizes) or sizes[0] % format.columns:
        raise MalformedError(f"{what} has shape {sizes[::-1]}, expected rows of a multiple of {format.columns} values")
    size = math.prod(sizes) // format.columns * format.size
    return TensorInfo(name, tuple(reversed(sizes)), start, start + size, file)


def _placed(found: dict[str, TensorInfo], pairs: dict[str, Value], cursor: _Cursor) -> dict[str, TensorInfo]:
    """The tensors in data order, with offsets from the beginning of the file."""
    alignment = pairs.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 1 <= alignment <= 1 << 20 or alignment & (alignment - 1):
        raise MalformedError(f"has the alignment {one_line(repr(alignment))}, expected a power of two")
    base = -(-cursor.at // alignment) * alignment
    placed: dict[str, TensorInfo] = {}
    end = base
    for name, info in sorted(found.items(), key=lambda item: item[1].start):
        start, stop = base + info.start, base + info.stop
        if info.start % alignment:
            raise MalformedError(
                f"tensor {quote(name)} begins at data byte {info.start}, expected multiples of {alignment}"
            )
        if start < end:
            raise MalformedError(f"tensor {quote(name)} overlaps the previous tensor, at data byte {info.start}")
        if stop > cursor.size:
            problem = f"ends at byte {stop}, but the file has {cursor.size}"
            raise MalformedError(f"tensor {quote(name)} is truncated: it {problem}")
        placed[name] = TensorInfo(info.dtype, info.shape, start, stop, info.file)
        end = stop
    return placed
