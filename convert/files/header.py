# SPDX-License-Identifier: Apache-2.0
"""Parses the header of a safetensors file: bytes in, validated tensor descriptions out. Opens no files.

The bytes are untrusted. The header's grammar is small (an object of flat objects), so a scanner for exactly that
grammar replaces a JSON parser: nesting, floats, booleans and long lists are rejected where they begin, so that memory
and time stay proportional to the header's length. It accepts what the `safetensors` library accepts, except for input
that no writer produces: unknown fields, integers of 2^63 and above, more than 64 dimensions, and duplicate keys.

File layout: 8 bytes little-endian header length n, n bytes of header, then the data, which the tensors cover exactly,
without gaps or overlaps.
"""

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

from jaxserve.errors import one_line

MAX_RANK = 64  # numpy's limit
_MAX_INT = 2**63 - 1

_WIDTHS = {
    4: "F4",  # F4 and F6 are packed; a tensor must still end on a byte boundary
    6: "F6_E2M3 F6_E3M2",
    8: "BOOL U8 I8 F8_E4M3 F8_E5M2 F8_E4M3FNUZ F8_E5M2FNUZ F8_E8M0",
    16: "U16 I16 F16 BF16",
    32: "U32 I32 F32",
    64: "U64 I64 F64 C64",
}
BITS = {dtype: bits for bits, dtypes in _WIDTHS.items() for dtype in dtypes.split()}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor. `start` and `stop` are byte offsets from the beginning of `file`."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int
    file: Path


class MalformedError(Exception):
    """A fault in a file's content. The caller adds the file's name."""


def quote(name: str) -> str:
    return f"'{one_line(name, limit=120)}'"


def parse(header: bytes, *, size: int, file: Path) -> dict[str, TensorInfo]:
    """The tensors of a file of `size` bytes with this header, in data order."""
    entries, end = _object("its header", header, 0, _header_value)
    if end != len(header):
        raise MalformedError(f"its header has data after the JSON object, at header byte {end}")
    entries.pop("__metadata__", None)
    base = 8 + len(header)
    tensors = {
        name: _tensor(f"tensor {quote(name)}", cast(dict[str, Any], entry), base=base, file=file)
        for name, entry in entries.items()
    }
    tensors = dict(sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)))
    _check_layout(tensors, base=base, size=size)
    return tensors


# -- meaning


def _tensor(what: str, fields: dict[str, Any], *, base: int, file: Path) -> TensorInfo:
    for name in ("dtype", "shape", "data_offsets"):
        if name not in fields:
            raise MalformedError(f"{what} has no {name}")
    dtype: str = fields["dtype"]
    shape: tuple[int, ...] = fields["shape"]
    offsets: tuple[int, ...] = fields["data_offsets"]
    if dtype not in BITS:
        raise MalformedError(f"{what} has dtype {quote(dtype)}, expected one of {', '.join(BITS)}")
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise MalformedError(f"{what}: data_offsets must be [begin, end] with begin <= end")
    if max((*shape, *offsets), default=0) > _MAX_INT:
        raise MalformedError(f"{what} has a dimension or offset above 2^63-1")
    bits = math.prod(shape) * BITS[dtype]
    if bits != (offsets[1] - offsets[0]) * 8:
        # A malicious shape's product can have over a thousand digits.
        needs = f"{bits / 8:.12g}" if bits <= _MAX_INT else "over 2^60"
        holds = f"but its data_offsets span {offsets[1] - offsets[0]}"
        raise MalformedError(f"{what}: {dtype} of shape {list(shape)} needs {needs} bytes, {holds}")
    return TensorInfo(dtype, shape, base + offsets[0], base + offsets[1], file)


def _check_layout(tensors: dict[str, TensorInfo], *, base: int, size: int) -> None:
    """Check that the tensors, in data order, cover the bytes from `base` to `size` exactly once."""
    end = base
    for name, info in tensors.items():
        if info.start != end:
            fault = "overlaps the previous tensor" if info.start < end else "leaves a gap before it"
            places = f"begins at data byte {info.start - base}, expected {end - base}"
            raise MalformedError(f"tensor {quote(name)} {fault}: {places}")
        end = info.stop
        if end > size:
            places = f"ends at data byte {end - base}, but the file has {size - base}"
            raise MalformedError(f"tensor {quote(name)} is truncated: {places}")
    if end != size:
        raise MalformedError(f"the last {size - end} bytes belong to no tensor")


# -- grammar

# Possessive quantifiers (*+) keep the matcher from storing a backtracking state for each of 10^8 characters.
_INT = rb"(?:0|[1-9][0-9]{0,18})"
_WS = rb"[ \t\r\n]*+"
_STRING = rb'"[^"\\\x00-\x1f]*+(?:\\.[^"\\\x00-\x1f]*+)*+"'
_OPEN = re.compile(_WS + rb"\{" + _WS)
_CLOSE = re.compile(rb"\}" + _WS)
_KEY = re.compile(rb"(" + _STRING + rb")" + _WS + rb":" + _WS)
_COMMA = re.compile(_WS + rb"(?:," + _WS + rb'(?=")|(?=\}))')
_TEXT = re.compile(_STRING)
_ITEMS = rb"(?:" + _INT + _WS + rb"," + _WS + rb"){0,%d}" % (MAX_RANK - 1) + _INT
_INTS = re.compile(rb"\[" + _WS + rb"(" + _ITEMS + rb")?" + _WS + rb"\]")

# Reads one value of an object at offset `at`; returns it and its end offset.
_Value = Callable[[str, bytes, int], tuple[object, int]]


def _object(what: str, text: bytes, at: int, value: _Value) -> tuple[dict[str, object], int]:
    found: dict[str, object] = {}
    match = _OPEN.match(text, at)
    if not match:
        raise MalformedError(f"{what} must be a JSON object")
    at = match.end()
    while not (match := _CLOSE.match(text, at)):
        key = _KEY.match(text, at)
        if not key:
            raise MalformedError(f"{what} is not well-formed JSON at header byte {at}")
        name = _string(key[1])
        if name in found:
            raise MalformedError(f"{what} names {quote(name)} twice")
        found[name], at = value(name, text, key.end())
        comma = _COMMA.match(text, at)
        if not comma:
            raise MalformedError(f"{what} is not well-formed JSON after {quote(name)}")
        at = comma.end()
    return found, match.end()


def _string(literal: bytes) -> str:
    try:
        if b"\\" not in literal:
            return literal[1:-1].decode()
        text = cast(str, json.loads(literal.decode()))
        text.encode()  # "\ud800" is valid JSON but not valid UTF-8
        return text
    except ValueError:
        raise MalformedError("its header contains a string that is not valid UTF-8 JSON") from None


def _header_value(name: str, text: bytes, at: int) -> tuple[object, int]:
    if name != "__metadata__":
        what = f"tensor {quote(name)}"
        return _object(what, text, at, partial(_field, what))
    if text.startswith(b"null", at):
        return None, at + 4
    return _object("__metadata__", text, at, _metadata_value)


def _metadata_value(name: str, text: bytes, at: int) -> tuple[object, int]:
    if not (match := _TEXT.match(text, at)):
        raise MalformedError(f"__metadata__ value {quote(name)} must be a string")
    return _string(match[0]), match.end()


def _field(what: str, name: str, text: bytes, at: int) -> tuple[object, int]:
    if name == "dtype":
        if not (match := _TEXT.match(text, at)):
            raise MalformedError(f"{what}: dtype must be a string")
        return _string(match[0]), match.end()
    if name not in ("shape", "data_offsets"):
        expected = "expected dtype, shape and data_offsets"
        raise MalformedError(f"{what} has unknown field {quote(name)}, {expected}")
    if not (match := _INTS.match(text, at)):
        expected = f"a list of at most {MAX_RANK} integers from 0 to 2^63-1"
        raise MalformedError(f"{what}: {name} must be {expected}")
    return tuple(int(part) for part in match[1].split(b",")) if match[1] else (), match.end()
