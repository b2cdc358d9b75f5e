# SPDX-License-Identifier: Apache-2.0
"""Which paths name a GGUF file. Looks at names alone, and imports nothing that takes time."""

import os
from pathlib import Path

from jaxserve.errors import CheckpointError, one_line


def is_gguf(path: str | Path) -> bool:
    return str(path).lower().endswith(".gguf")


def source_of(path: Path) -> Path | None:
    """The GGUF file that this path names: itself, or the only one in a folder that has no config."""
    if not path.is_dir():
        return path if is_gguf(path) and path.is_file() else None
    if (path / "config.json").is_file() or not os.access(path, os.R_OK | os.X_OK):
        return None
    found = [each for each in sorted(path.iterdir()) if is_gguf(each)]
    if len(found) > 1:
        names = ", ".join(each.name for each in found[:5])
        problem = f"folder {one_line(repr(str(path)))} has several GGUF files: {one_line(names)}"
        raise CheckpointError(problem, "name one of them")
    return found[0] if found else None
