# SPDX-License-Identifier: Apache-2.0
"""The text that a model is calibrated on: a plain file, or JSON lines with a `text` each."""

import json
from pathlib import Path
from typing import Any, cast

import numpy as np

from convert.files.reader import Array
from jaxserve.errors import CheckpointError, one_line
from jaxserve.text import tokenizer

LENGTH, MOST = 512, 144  # tokens of a sequence, and sequences that are used at most
_FEWEST = 32  # tokens of a sequence
_HELD = 9  # of so many sequences, one is held out
_BYTES = 1 << 28


def sequences(file: Path, folder: Path, longest: int) -> tuple[Array, Array]:
    """int32 [count, length] each: tokens to calibrate on, and tokens that are held out to measure perplexity with."""
    tokens = _tokens(file, folder)
    length = min(LENGTH, longest, len(tokens) // _HELD)
    if length < min(_FEWEST, longest):
        problem = f"{one_line(str(file), limit=1000)} has {len(tokens)} tokens, expected at least {_FEWEST * _HELD}"
        raise CheckpointError(problem, f"name a longer text; up to {LENGTH * MOST:,} tokens are used")
    count = min(MOST, len(tokens) // length)
    found = np.array(tokens[: count * length], np.int32).reshape(count, length)
    held = np.arange(count) % _HELD == _HELD - 1
    return found[~held], found[held]


def _tokens(file: Path, folder: Path) -> list[int]:
    loaded = tokenizer.load(folder)
    found: list[int] = []
    for text in _texts(file):
        found += loaded.encode(text)
        if len(found) > LENGTH * MOST:
            break
    return found


def _texts(file: Path) -> list[str]:
    shown = one_line(str(file), limit=1000)
    try:
        if file.stat().st_size > _BYTES:
            raise CheckpointError(f"{shown} is larger than {_BYTES >> 20} MiB", "name a shorter text")
        content = file.read_text(encoding="utf-8")
    except OSError as error:
        raise CheckpointError(
            f"cannot read {shown} ({(error.strerror or str(error)).lower()})", "check the path"
        ) from None
    except UnicodeDecodeError:
        raise CheckpointError(f"{shown} is not a text in UTF-8", "name a text, or JSON lines") from None
    if not content.strip():
        raise CheckpointError(f"{shown} is empty", "name a text like what the model is to read")
    if file.suffix != ".jsonl":
        return [content]
    return [
        _text(line, f"{shown}, line {number}") for number, line in enumerate(content.splitlines(), 1) if line.strip()
    ]


def _text(line: str, where: str) -> str:
    try:
        found: Any = json.loads(line)
    except (ValueError, RecursionError):
        found = None
    text = cast(Any, found).get("text") if isinstance(found, dict) else found
    if not isinstance(text, str):
        raise CheckpointError(f"{where} is not a text", 'expected {"text": "..."} or "..." in each line')
    return text
