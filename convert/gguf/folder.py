# SPDX-License-Identifier: Apache-2.0
"""Gives a GGUF file the form of a Hugging Face model folder: config and tokenizer as files, and a link to the weights.

All that reads models reads such folders, so nothing else needs to know where a config or a tokenizer came from. They
are written once for each file, into a cache, and are made again if the file or this code changes.
"""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Generator
from pathlib import Path
from typing import Any

from convert.gguf import architectures, header, tokenizer
from convert.gguf.fields import Fields
from convert.gguf.source import source_of
from jaxserve import __version__
from jaxserve.errors import CheckpointError, one_line
from jaxserve.models import registry
from jaxserve.text import missing

WEIGHTS = "model.gguf"
_FORM = 1  # version of what is written


def resolved(path: Path) -> Path:
    """The model folder that a path stands for: the path itself, unless it names a GGUF file."""
    file = source_of(path)
    return path if file is None else of(file)


def of(file: Path) -> Path:
    """The model folder of a GGUF file."""
    place = _cache() / _key(file)
    if not (place / WEIGHTS).exists():
        contents, error = _contents(file)
        with _writable(place):
            place.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            _discard_old(place.parent)
            _write(place, contents, error, file)
    return place


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxserve" / "gguf"


def _key(file: Path) -> str:
    try:
        status = file.stat()
    except OSError as error:
        header.fail(file, f"cannot be read ({(error.strerror or type(error).__name__).lower()})", "check the path")
    about = (_FORM, __version__, str(file.resolve()), status.st_size, status.st_mtime_ns)
    return hashlib.sha256(repr(about).encode()).hexdigest()[:32]


def _contents(file: Path) -> tuple[dict[str, dict[str, Any]], CheckpointError | None]:
    """The files of the folder, by name, and why there is no tokenizer: the weights are of use without it."""
    fields = Fields(header.read(file))
    config = architectures.config_of(fields)
    _check(config, file)
    found: dict[str, dict[str, Any]] = {"config.json": config}
    try:
        vocabulary = tokenizer.Vocabulary(fields)
        bos = vocabulary.special["bos"]
        found["generation_config.json"] = {"bos_token_id": bos, "eos_token_id": vocabulary.ends}
        config |= {**found["generation_config.json"], "pad_token_id": vocabulary.special["pad"]}
        found |= tokenizer.files_of(fields, vocabulary)
    except CheckpointError as error:
        return found, CheckpointError(error.problem, tokenizer.HINT)
    return found, None


def _check(config: dict[str, Any], file: Path) -> None:
    """Errors in a config are those of the file that it was made from."""
    try:
        registry.spec_of(config)
    except CheckpointError as error:
        problem = error.problem.replace("config.json", "its config")
        raise CheckpointError(f"{one_line(str(file), limit=1000)}: {problem}", error.hint) from None


def _write(place: Path, contents: dict[str, dict[str, Any]], error: CheckpointError | None, file: Path) -> None:
    """Write all of it or nothing; another process may be doing the same."""
    made = Path(tempfile.mkdtemp(prefix="making-", dir=place.parent))
    try:
        for name, content in contents.items():
            (made / name).write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding="utf-8")
        if error is not None:
            missing.write(made, error)
        (made / WEIGHTS).symlink_to(file.resolve())
        with contextlib.suppress(OSError):  # another process was first
            os.rename(made, place)
    finally:
        shutil.rmtree(made, ignore_errors=True)
    if not (place / WEIGHTS).exists():
        raise OSError(f"no {WEIGHTS}")


def _discard_old(cache: Path) -> None:
    """Remove the folders of files that are gone."""
    for each in cache.iterdir():
        link = each / WEIGHTS
        if link.is_symlink() and not link.exists():
            shutil.rmtree(each, ignore_errors=True)


@contextlib.contextmanager
def _writable(place: Path) -> Generator[None]:
    try:
        yield
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        problem = (
            f"cannot write the config and tokenizer of a GGUF file to {one_line(str(place), limit=1000)} ({reason})"
        )
        raise CheckpointError(problem, "set XDG_CACHE_HOME to a folder that can be written") from None
