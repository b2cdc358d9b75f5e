# SPDX-License-Identifier: Apache-2.0
"""`jaxserve convert` and `python -m convert`: a model from the hub or a folder into the converted form."""

import json
import shutil
import stat
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, cast

from jaxserve.errors import CheckpointError
from jaxserve.flags.parsing import Arg


@dataclass(frozen=True)
class Convert:
    """Write a model in the form that starts fastest, and that JAX programs can restore with Orbax."""

    source: Annotated[str, Arg(positional=True, metavar="SRC")]
    """A model folder, or a hub model such as org/name."""

    destination: Annotated[Path, Arg(positional=True, metavar="DST")]
    """The folder to make."""

    revision: str | None = None
    """A branch, tag or commit of the hub model."""

    dtype: Literal["bfloat16", "float16", "float32"] | None = None
    """Store parameters as this, and not in the checkpoint's own dtypes."""

    offline: bool = False
    """Use the hub's cache alone."""

    overwrite: bool = False
    """Replace DST if it holds a converted model."""

    def run(self) -> None:
        from convert.files import hub, output

        started = time.monotonic()
        # What DST is comes first, then the config, and jax only when both are right.
        output.check(self.destination, overwrite=self.overwrite, ours=_ours)
        folder = hub.fetch(self.source, revision=self.revision, offline=self.offline, check=_check)
        size, count = self._convert(folder)
        seconds = time.monotonic() - started
        print(f"wrote {self.destination}: {size / 1e9:.2f} GB in {count:,} tensors, {seconds:.1f} s")

    def _convert(self, folder: Path) -> tuple[int, int]:
        import jax

        cast(Any, jax.config).update("jax_platforms", "cpu")  # nothing is computed; a GPU may be in use
        from convert import load, orbax
        from convert.files import output, progress

        plan = load.open_model(folder)
        with output.folder(self.destination, overwrite=self.overwrite, ours=_ours) as made:
            output.check_room(self.destination, plan.size(self.dtype))
            with progress.bar("converting", plan.bytes) as told:
                source = {"name": self.source, "revision": _commit(self.source, folder)}
                orbax.write(plan, made, source=source, dtype=self.dtype, progress=told)
            with output.explained(self.destination):
                _copy_along(folder, made)
            written = orbax.plan(made)  # as a reader will see it
        return written.bytes, len(written.pieces)


def _ours(folder: Path) -> bool:
    """Whether a conversion has written this folder."""
    spec = folder / "spec.json"
    try:
        status = spec.stat()
        plain = stat.S_ISREG(status.st_mode) and status.st_size < 10**7
        content = json.loads(spec.read_bytes()) if plain else None
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and {"format", "jaxserve", "spec"} <= cast(Any, content).keys()


def _check(folder: Path) -> None:
    """Called once the config is here, and the weights are not."""
    from jaxserve.models import registry

    if not _ours(folder):
        registry.read_config(folder)


def _commit(source: str, folder: Path) -> str | None:
    return None if Path(source).expanduser() == folder else folder.name


def _copy_along(folder: Path, made: Path) -> None:
    """Config, tokenizer and chat templates as they are; never code, and no weights."""
    from convert.files.hub import SMALL, TEMPLATE

    templates = (str(path.relative_to(folder)) for path in folder.glob("*/*.jinja"))
    for name in ("config.json", *sorted(SMALL), *(name for name in templates if TEMPLATE.fullmatch(name))):
        if not (folder / name).is_file():
            continue
        if (folder / name).stat().st_size > 10**9:
            raise CheckpointError(f"{name} of the source has over 1 GB", "check the file")
        (made / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(folder / name, made / name)
