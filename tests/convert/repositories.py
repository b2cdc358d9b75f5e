# SPDX-License-Identifier: Apache-2.0
"""The repositories that the fake hub serves, and checks of `fetch` that several tests share."""

import json
from pathlib import Path
from typing import Any

import pytest

from convert.files.hub import fetch
from jaxserve.errors import CheckpointError
from tests.convert.crafted import one

ID = "org/tiny"
SMALL = {
    "config.json": b'{"model_type": "llama"}',
    "generation_config.json": b"{}",
    "tokenizer.json": b'{"version": "1.0"}',
    "tokenizer_config.json": b'{"model_max_length": 8}',
    "chat_template.jinja": b"{{ messages }}",
    "additional_chat_templates/tool_use.jinja": b"{{ tools }}",
}
WEIGHTS = one()
MODULES = {  # of sentence-transformers
    "modules.json": b"[]",
    "1_Pooling/config.json": b'{"pooling_mode": "mean"}',
    "2_Dense/config.json": b"{}",
    "2_Dense/model.safetensors": one(dtype="I8"),
}
SINGLE = {**SMALL, "model.safetensors": WEIGHTS}
SHARDS = {f"model-0000{n}-of-00002.safetensors": one(dtype=kind) for n, kind in ((1, "U8"), (2, "I8"))}
MAP = dict(zip("ab", SHARDS, strict=True))
INDEX = {"model.safetensors.index.json": json.dumps({"weight_map": MAP}).encode()}
JUNK = {
    **{name: b"import os" for name in ("modeling_tiny.py", "README.md", ".gitattributes", "LICENSE", "logo.png")},
    **{name: b"PK" for name in ("pytorch_model.bin", "consolidated.00.pth", "tiny.gguf", "onnx/model.onnx")},
    **{name: b"PK" for name in ("original/params.json", "consolidated.safetensors", "onnx/model.safetensors")},
    **{
        name: b""
        for name in (
            "additional_chat_templates/x/y.jinja",
            "sub/config.json",
            "tokenizer.py",
            "../config.json",
            "2_Dense/pytorch_model.bin",
        )
    },
}


def refused(source: str, *expected: str, **options: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        fetch(source, **options)
    message = str(caught.value)
    assert message.isprintable(), "more than one line, or something a terminal would obey"
    assert len(message) < 1500 and message.count("; ") == 1
    for part in expected:
        assert part in message
    return message


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
