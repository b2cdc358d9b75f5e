# SPDX-License-Identifier: Apache-2.0
"""The file of --json: checked before a benchmark runs, written after it; - means standard output.

Numbers have no digits that no clock measures.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from jaxserve.errors import UsageError


def check(file: Path | None) -> None:
    if file is not None and str(file) != "-" and (file.is_dir() or not file.parent.is_dir()):
        raise UsageError(f"cannot write to {file}", "name a file in an existing folder")


def text_of(results: Mapping[str, Any]) -> str:
    return json.dumps(_rounded(dict(results)))


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.8g}")
    if isinstance(value, dict):
        return {name: _rounded(each) for name, each in cast("dict[str, Any]", value).items()}
    return [_rounded(each) for each in cast("list[Any]", value)] if isinstance(value, list) else value


def write(file: Path, text: str) -> None:
    if str(file) == "-":
        print(text)
    else:
        file.write_text(text + "\n")
