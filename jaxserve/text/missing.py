# SPDX-License-Identifier: Apache-2.0
"""A file in a model folder that says why it has no tokenizer, for folders that were made from other formats."""

import json
from pathlib import Path

from jaxserve.errors import CheckpointError

NAME = "tokenizer_missing.json"


def write(folder: Path, error: CheckpointError) -> None:
    (folder / NAME).write_text(json.dumps({"problem": error.problem, "hint": error.hint}), encoding="utf-8")


def check(folder: Path) -> None:
    """Raise the error that was written into the folder, if any."""
    if (folder / NAME).is_file():
        raise CheckpointError(**json.loads((folder / NAME).read_text(encoding="utf-8")))
