# SPDX-License-Identifier: Apache-2.0
"""Writes safetensors files by hand, valid and invalid ones."""

import json
from pathlib import Path
from typing import Any

import pytest

from convert.files.safetensors import read_checkpoint
from jaxserve.errors import CheckpointError


def blob(content: object, data: bytes = b"") -> bytes:
    """A safetensors file with this header, given as an object or as raw bytes."""
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(dtype: Any = "U8", shape: Any = (1,), offsets: Any = (0, 1)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def one(**fields: Any) -> bytes:
    return blob({"a": entry(**fields)}, b"\0")


def refused(path: Path, *expected: str) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(path)
    message = str(caught.value)
    assert message.isprintable(), "more than one line, or something a terminal would obey"
    assert len(message) < 5000
    for part in expected:
        assert part in message
    return message
