# SPDX-License-Identifier: Apache-2.0
"""The file of --json: checked before a benchmark runs, written after it; - means standard output."""

from pathlib import Path

from jaxserve.errors import UsageError


def check(file: Path | None) -> None:
    if file is not None and str(file) != "-" and (file.is_dir() or not file.parent.is_dir()):
        raise UsageError(f"cannot write to {file}", "name a file in an existing folder")


def write(file: Path, text: str) -> None:
    if str(file) == "-":
        print(text)
    else:
        file.write_text(text + "\n")
