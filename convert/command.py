# SPDX-License-Identifier: Apache-2.0
"""`jaxserve convert` and `python -m convert`: converts a model from a folder or the Hub to the Orbax format, or to a
quantized checkpoint."""

import json
import shutil
import stat
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, cast

from jaxserve.errors import CheckpointError, UsageError
from jaxserve.flags.setting import Setting

QUANTIZED = "jaxserve.json"  # what a quantized checkpoint was made of


@dataclass(frozen=True)
class Convert:
    """Convert a model to Orbax format, which loads fastest, or to a quantized checkpoint."""

    source: Annotated[
        str,
        Setting("Model folder, .gguf file, or Hugging Face Hub ID such as org/name.", given_as="word", metavar="SRC"),
    ]
    destination: Annotated[Path, Setting("Folder to create.", given_as="word", metavar="DST")]
    revision: Annotated[str | None, Setting("Branch, tag or commit of the Hub model.", empty=True)] = None
    dtype: Annotated[
        Literal["bfloat16", "float16", "float32"] | None,
        Setting("Data type to store parameters in (default: the checkpoint's)."),
    ] = None
    quantize: Annotated[
        Literal[
            "int8", "int8_per_channel_weight_only", "int4", "fp8", "fp8_per_channel", "fp8_per_block", "awq", "gptq"
        ]
        | None,
        Setting(
            "Write a compressed-tensors checkpoint with weights rounded by this method, which vLLM and transformers "
            "load too, instead of Orbax format. awq and gptq have 4 bits as int4, and lose less: they need "
            "--calibration."
        ),
    ] = None
    calibration: Annotated[
        Path | None,
        Setting(
            "Text for awq and gptq, like what the model is to read: a plain file, or .jsonl with a text in each line. "
            "About 70,000 tokens of it are used, and a ninth of them to measure perplexity."
        ),
    ] = None
    offline: Annotated[bool, Setting("Use only the local Hugging Face cache.")] = False
    overwrite: Annotated[bool, Setting("Replace DST if a conversion wrote it.")] = False

    def run(self) -> None:
        from convert.files import hub, output

        started = time.monotonic()
        self._check_calibration()
        # DST is checked first, then the config; jax starts only if both are valid.
        output.check(self.destination, overwrite=self.overwrite, ours=_ours)
        folder = hub.fetch(self.source, revision=self.revision, offline=self.offline, check=_check)
        size, count = self._convert(folder) if self.quantize is None else self._quantize(folder, self.quantize)
        seconds = time.monotonic() - started
        shown = f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
        print(f"wrote {self.destination}: {shown} in {count:,} tensors, {seconds:.1f} s")

    def _convert(self, folder: Path) -> tuple[int, int]:
        import jax

        cast(Any, jax.config).update("jax_platforms", "cpu")  # no computation is needed, and a GPU may be in use
        from convert import load, orbax
        from convert.files import output, pooled, progress

        plan = load.open_model(folder)
        with output.folder(self.destination, overwrite=self.overwrite, ours=_ours) as made:
            output.check_room(self.destination, plan.size(self.dtype))
            with progress.bar("converting", plan.bytes) as progressed:
                source = {"name": self.source, "revision": _commit(self.source, folder)}
                orbax.write(plan, made, source=source, dtype=self.dtype, progress=progressed)
            with output.explained(self.destination):
                _copy_along(folder, made, "config.json")
                pooled.copy(folder, made)
            written = orbax.plan(made)  # as a reader will see it
        return written.bytes, len(written.pieces)

    def _quantize(self, folder: Path, method: Any) -> tuple[int, int]:
        import jax

        cast(Any, jax.config).update("jax_platforms", "cpu")
        from convert import load
        from convert.files import output, pooled, progress, safetensors
        from convert.files.reader import Reader
        from convert.quantize import calibrated, calibration, checkpoint
        from jaxserve import __version__

        source = checkpoint.PlainModel.open(folder, load.open_model(folder), method, dtype=self.dtype)
        texts = None
        if self.calibration is not None:
            texts = calibration.sequences(self.calibration, folder, source.plan.spec.max_positions)
        with output.folder(self.destination, overwrite=self.overwrite, ours=_ours) as made:
            output.check_room(self.destination, checkpoint.size(source))
            with progress.bar("quantizing", source.bytes) as done, Reader() as reader:
                by_text = None if texts is None else calibrated.ByText(source, reader, method, texts)
                rounder = by_text or checkpoint.Nearest(source, reader)
                with output.explained(self.destination):
                    checkpoint.write(source, made, rounder=rounder, reader=reader, done=done)
            with output.explained(self.destination):
                _copy_along(folder, made)
                pooled.copy(folder, made)
                origin = {"name": self.source, "revision": _commit(self.source, folder)}
                about = {"jaxserve": __version__, "source": origin, "quantize": method}
                (made / QUANTIZED).write_text(json.dumps(about, indent=1) + "\n")
            load.open_model(made)  # as a reader will see it
            if by_text is not None:
                print(by_text.report())
            written = safetensors.read_checkpoint(made).values()
        return sum(info.stop - info.start for info in written), len(written)

    def _check_calibration(self) -> None:
        calibrated = self.quantize in ("awq", "gptq")
        if calibrated and self.calibration is None:
            hint = "set --calibration to a text like what the model is to read, or choose int4, which needs none"
            raise UsageError(f"--quantize {self.quantize} needs a text", hint)
        if self.calibration is not None and not calibrated:
            raise UsageError("--calibration is set without --quantize awq or gptq", "leave it out")


def _ours(folder: Path) -> bool:
    """Whether a conversion has written this folder."""
    return _has_keys(folder / "spec.json", {"format", "jaxserve", "spec"}) or _has_keys(
        folder / QUANTIZED, {"jaxserve", "source", "quantize"}
    )


def _has_keys(file: Path, keys: set[str]) -> bool:
    try:
        status = file.stat()
        plain = stat.S_ISREG(status.st_mode) and status.st_size < 10**7
        content = json.loads(file.read_bytes()) if plain else None
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and keys <= cast(Any, content).keys()


def _check(folder: Path) -> None:
    """Called when the config is downloaded and the weights are not."""
    from jaxserve.models import registry

    if not _has_keys(folder / "spec.json", {"spec"}):
        registry.read_config(folder)


def _commit(source: str, folder: Path) -> str | None:
    return None if Path(source).expanduser() == folder else folder.name


def _copy_along(folder: Path, made: Path, *more: str) -> None:
    """Copies tokenizer, chat templates and these files unchanged; never code or weights."""
    from convert.files.hub import SMALL, TEMPLATE

    templates = (str(path.relative_to(folder)) for path in folder.glob("*/*.jinja"))
    for name in (*more, *sorted(SMALL), *(name for name in templates if TEMPLATE.fullmatch(name))):
        if not (folder / name).is_file():
            continue
        if (folder / name).stat().st_size > 10**9:
            raise CheckpointError(f"{name} of the source is larger than 1 GB", "check the file")
        (made / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(folder / name, made / name)
