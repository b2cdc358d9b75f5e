# SPDX-License-Identifier: Apache-2.0
"""Writes GGUF files by hand, valid and invalid ones."""

import struct
from collections.abc import Mapping, Sequence
from typing import Any

UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY, UINT64 = 4, 5, 6, 7, 8, 9, 10


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def pair(key: str | bytes, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def typed(value: Any) -> tuple[int, bytes]:
    match value:
        case bool():
            return BOOL, bytes([value])
        case int():
            return UINT32, struct.pack("<I", value)
        case float():
            return FLOAT32, struct.pack("<f", value)
        case str():
            return STRING, text(value)
        case _:
            kinds = [typed(each) for each in value]
            kind = kinds[0][0] if kinds else STRING
            kind = INT32 if kind == UINT32 else kind  # of lists, as llama.cpp's converter writes them
            return ARRAY, struct.pack("<IQ", kind, len(kinds)) + b"".join(data for _, data in kinds)


def tensor(name: str | bytes, shape: Sequence[int], kind: int, offset: int) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def blob(
    pairs: Mapping[str, Any] | Sequence[bytes] = (),
    tensors: Sequence[bytes] = (),
    data: bytes = b"",
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    counts: tuple[int, int] | None = None,
    alignment: int = 32,
) -> bytes:
    """`counts`: of tensors and pairs, instead of the true ones."""
    listed = [pair(key, *typed(value)) for key, value in pairs.items()] if isinstance(pairs, Mapping) else list(pairs)
    tensor_count, pair_count = counts or (len(tensors), len(listed))
    start = magic + struct.pack("<IQQ", version, tensor_count, pair_count) + b"".join([*listed, *tensors])
    return start + bytes(-len(start) % alignment) + data
