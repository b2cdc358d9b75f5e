# SPDX-License-Identifier: Apache-2.0
"""Resolves a model name to a local folder; a model with a Hub ID is downloaded, and a GGUF file is given a folder.

huggingface_hub downloads into its own cache, so its settings (HF_TOKEN, HF_HOME, HF_ENDPOINT, ...) apply. This module
decides which files to download, all from one commit, and in which order, and reports each failure in one line.

The order distinguishes a complete folder from an interrupted download without asking the Hub: config.json is the last
of the small files, weights follow it, and a branch's ref in the cache is updated only when every requested file exists.
"""

import logging
import os
import re
import shutil
import stat
import sys
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, cast

from convert.files.header import quote
from convert.files.hub_faults import HINT_AGAIN, HINT_ENDPOINT, HINT_ROOM, HubModel, explained, few, reason, shown
from convert.files.pooled import MODULE, MODULES
from convert.files.safetensors import read_index
from convert.gguf.source import is_gguf, source_of
from jaxserve import __version__
from jaxserve.errors import CheckpointError

if TYPE_CHECKING:  # it takes a second to import, and a local folder does not need it
    from huggingface_hub import HfApi

__all__ = ["SMALL", "TEMPLATE", "fetch"]

_CONFIG = "config.json"
# Files that are read from a model folder besides its config and weights.
SMALL = {
    *(
        "generation_config.json",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "vocab.json",
        "vocab.txt",
    ),
    *("merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "chat_template.json"),
    *("quantize_config.json", "quant_config.json", "hf_quant_config.json"),  # of quantized models, by older tools
    MODULES,
}
TEMPLATE = re.compile(r"additional_chat_templates/\w[\w.-]*\.jinja")
_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_FOREIGN = (".bin", ".gguf", ".pth", ".pt", ".ckpt", ".h5", ".msgpack", ".onnx", ".safetensors")

# Stricter than paths and URLs require, so that no ID or revision can escape to another location in either.
_LOOKS_LIKE_PATH = re.compile(r"[./~]|[A-Za-z]:|.*/.*/|.*\\", re.DOTALL)
_NAME = r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,94}[A-Za-z0-9_])?"
_HUB_ID = re.compile(rf"(?!.*(?:--|\.\.))(?!.*\.git\Z)(?:{_NAME}/)?{_NAME}")
_REVISION = re.compile(r"(?!.*(?:\.\.|//|/\.))\w(?:[\w./+@#=-]{0,198}[\w+@#=-])?")
_COMMIT = re.compile(r"[0-9a-f]{40}")


def fetch(
    source: str,
    *,
    revision: str | None = None,
    offline: bool = False,
    cache_dir: Path | None = None,
    weights: bool = True,
    progress: bool | None = None,
    check: Callable[[Path], object] | None = None,
) -> Path:
    """Return the local folder of the model `source`: a folder, a GGUF file, or a Hub ID such as org/name.

    A local folder takes precedence over a Hub model of the same name. `revision` is a branch, tag or commit of a Hub
    model (default main); it is resolved once, and the returned folder is named after its commit. `check` is called with
    the folder before any weights are downloaded, and cancels the download by raising. `weights=False` skips weights.
    `offline`, or HF_HUB_OFFLINE=1, uses only the cache. `progress=None` shows a bar if stderr is a terminal.
    """
    folder = _local_folder(source)
    if folder is not None and revision is not None:
        raise CheckpointError(f"{quote(source)} is a local folder and has no revisions", "remove the revision")
    if folder is None:
        model = _hub_model(source, revision=revision, cache_dir=cache_dir)
        if offline or _offline_by_env():
            folder = _from_cache(model, weights=weights)
        else:
            return _from_hub(model, weights=weights, progress=progress, check=check)
    if check:
        check(folder)
    return folder


# -- resolving the name


def _local_folder(source: str) -> Path | None:
    """The folder that `source` names; None if it can only be a Hub model."""
    path = os.path.expanduser(source)
    hint = "check the path, or name a Hub model as org/name"
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as error:  # ValueError: a NUL
        if not (_LOOKS_LIKE_PATH.match(source) or is_gguf(source)):
            return None
        if isinstance(error, FileNotFoundError | NotADirectoryError):
            kind = "file" if is_gguf(source) else "folder"
            raise CheckpointError(f"{kind} {quote(source)} does not exist", hint) from None
        raise CheckpointError(f"cannot read folder {quote(source)} ({reason(error)})", hint) from None
    if file := source_of(Path(path)):
        from convert.gguf import folder

        return folder.of(file)
    if not stat.S_ISDIR(mode):
        problem = f"{quote(source)} is a file, not a model folder"
        raise CheckpointError(problem, "name the folder that contains it, or a .gguf file")
    if not os.path.isfile(os.path.join(path, _CONFIG)):
        problem = f"folder {quote(source)} has no {_CONFIG}"
        hint = "name a Hugging Face model folder or a .gguf file"
        hint += " (a local folder takes precedence over a Hub model of the same name)"
        raise CheckpointError(problem, hint)
    return Path(path)


def _hub_model(source: str, *, revision: str | None, cache_dir: Path | None) -> HubModel:
    if not _HUB_ID.fullmatch(source):
        problem = f"{quote(source)} is neither a local folder nor a valid Hub ID"
        raise CheckpointError(problem, "check the path, or name a Hub model as org/name")
    revision = "main" if revision is None else revision
    if not _REVISION.fullmatch(revision):
        problem = f"{quote(revision)} is not a valid revision"
        raise CheckpointError(problem, f"name a branch, tag or commit of {quote(source)}")
    from huggingface_hub import constants

    # huggingface_hub reads its environment once, at import; this also honors an HF_ENDPOINT that was set later.
    endpoint = (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")
    cache = Path(cache_dir or constants.HF_HUB_CACHE).expanduser().resolve()
    return HubModel(source, revision, endpoint, cache)


def _offline_by_env() -> bool:
    from huggingface_hub import is_offline_mode

    value = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or ""
    return is_offline_mode() or value.upper() in {"1", "ON", "YES", "TRUE"}


# -- from the cache


def _from_cache(model: HubModel, *, weights: bool) -> Path:
    hint = "download it once while online"
    commit = model.revision
    if not _COMMIT.fullmatch(commit):
        with suppress(OSError):
            commit = (model.place / "refs" / model.revision).read_text(errors="replace").strip()
    folder = model.folder(commit)
    if not _COMMIT.fullmatch(commit) or not os.path.isdir(folder):
        raise CheckpointError(f"{model} is not in the cache {shown(model.cache)}, and offline mode is on", hint)
    missing = [] if os.path.isfile(folder / _CONFIG) else [_CONFIG]
    if weights and not os.path.isfile(folder / _SINGLE):
        if os.path.isfile(folder / _INDEX):
            shards = _shards(folder / _INDEX)
            missing += [shard for shard in shards if not os.path.isfile(folder / shard)]
        else:
            missing.append(_SINGLE)
    if missing:
        problem = f"{model} is incomplete in the cache {shown(model.cache)} (no {few(missing)}), and offline mode is on"
        raise CheckpointError(problem, hint)
    return folder


def _shards(index: Path) -> list[str]:
    return sorted(set(read_index(index).values()))


# -- from the Hub


def _from_hub(model: HubModel, *, weights: bool, progress: bool | None, check: Callable[[Path], object] | None) -> Path:
    from huggingface_hub import HfApi
    from huggingface_hub.utils import are_progress_bars_disabled

    if progress is None:
        progress = sys.stderr.isatty() and not are_progress_bars_disabled()
    api = HfApi(endpoint=model.endpoint, library_name="jaxserve", library_version=__version__)
    commit, sizes = _listing(api, model)
    if weights and _SINGLE not in sizes and _INDEX not in sizes:
        _refuse_for_weights(model, sizes)
    if _CONFIG not in sizes:
        raise CheckpointError(f"{model} has no {_CONFIG}", "name a repository that contains a Hugging Face model")

    def download(names: Iterable[str], what: str) -> None:
        label = f"{model.id} {what}" if progress else None
        _download(api, model, commit, {name: sizes[name] for name in names}, label=label)

    small = sorted(name for name in sizes if name in SMALL or TEMPLATE.fullmatch(name) or MODULE.fullmatch(name))
    download([*small, _CONFIG], "config and tokenizer")
    folder = model.folder(commit)
    if check:
        check(folder)
    if weights:
        names = [_SINGLE]
        if _SINGLE not in sizes:
            download([_INDEX], "index")
            names = _shards(folder / _INDEX)
            if absent := [name for name in names if name not in sizes]:
                problem = f"{model} has no {few(absent)}, which its {_INDEX} lists"
                raise CheckpointError(problem, "choose another revision, or report it to the repository's owner")
        download(names, "weights")
    _remember(model, commit)
    return folder


def _listing(api: "HfApi", model: HubModel) -> tuple[str, dict[str, int | None]]:
    """The commit that the revision currently points to, and its files with their sizes."""
    from huggingface_hub import constants

    with explained(model):
        timeout = constants.HF_HUB_ETAG_TIMEOUT
        info = api.model_info(model.id, revision=model.revision, files_metadata=True, timeout=timeout)
        sizes: dict[str, int | None] = {}
        for file in info.siblings or []:
            size = file.lfs.size if file.lfs else file.size
            sizes[str(file.rfilename)] = None if size is None else int(size)
    commit = str(info.sha)
    if not _COMMIT.fullmatch(commit) or (_COMMIT.fullmatch(model.revision) and commit != model.revision):
        raise CheckpointError(f"{model.endpoint} returned no valid commit for {model}", HINT_ENDPOINT)
    return commit, sizes


def _refuse_for_weights(model: HubModel, names: Iterable[str]) -> NoReturn:
    found: dict[str, str] = {}
    for name in names:
        if (suffix := Path(name).suffix.lower()) in _FOREIGN and not MODULE.fullmatch(name):
            found.setdefault(suffix, name)
    problem = f"{model} has no {_SINGLE} and no {_INDEX}"
    problem += f", only {few(list(found.values()))}" if found else ", and no other weights"
    hint = "name a repository that contains safetensors weights"
    if ".bin" in found:
        hint = "choose a revision with safetensors (often refs/pr/N), or convert it with transformers' save_pretrained"
    elif ".gguf" in found:
        hint = "download one of the GGUF files and name it, or name the repository that the GGUF files were made from"
    raise CheckpointError(problem, hint)


def _download(
    api: "HfApi", model: HubModel, commit: str, sizes: Mapping[str, int | None], *, label: str | None
) -> None:
    """Download the files that the cache lacks, one at a time so that Ctrl-C stops at once."""
    from huggingface_hub.utils import tqdm

    get = cast(Any, api).hf_hub_download  # its type hints omit tqdm_class
    folder = model.folder(commit)
    missing = {name: size for name, size in sizes.items() if not _complete(folder / name, size)}
    if not missing:
        return
    total = sum(size or 0 for size in missing.values())
    _check_room(model, total)
    with _hushed(label is None), tqdm(total=total, desc=label, unit="B", unit_scale=True, disable=label is None) as bar:
        for name, size in missing.items():
            path = folder / name
            if os.path.lexists(path) and not _complete(path, size):
                _discard(path)  # the machine crashed before the data reached the disk
            with explained(model, file=name):
                get(model.id, name, revision=commit, cache_dir=model.cache, tqdm_class=_part_of(bar))
            if not _complete(path, size):
                _discard(path)
                problem = f"{quote(name)} of {model} has the wrong size after download from {model.endpoint}"
                raise CheckpointError(f"{problem}: expected {size} bytes of commit {commit}", HINT_AGAIN)


def _complete(path: Path, size: int | None) -> bool:
    try:
        return path.is_file() and (size is None or path.stat().st_size == size)
    except OSError:
        return False


def _discard(path: Path) -> None:
    with suppress(OSError):
        blob = path.parent / os.readlink(path)
        blob.unlink(missing_ok=True)
    with suppress(OSError):
        path.unlink(missing_ok=True)


def _check_room(model: HubModel, needed: int) -> None:
    with suppress(OSError):
        existing = next(path for path in [model.cache, *model.cache.parents] if path.exists())
        disk = shutil.disk_usage(existing)
        if disk.total and needed > disk.free:
            problem = f"{model} needs {-(-needed // 10**6):,} MB more"
            problem += f", and the cache {shown(model.cache)} has {disk.free // 10**6:,} MB free"
            raise CheckpointError(problem, HINT_ROOM)


def _remember(model: HubModel, commit: str) -> None:
    """Store the revision's commit in the cache for offline use. A read-only cache is not an error."""
    if model.revision == commit:
        return
    ref = model.place / "refs" / model.revision
    written = ref.with_name(f"{ref.name}.{os.getpid()}.tmp")
    with suppress(OSError):
        ref.parent.mkdir(parents=True, exist_ok=True)
        written.write_text(commit)
        os.replace(written, ref)


def _part_of(bar: Any) -> type[Any]:
    """A tqdm-like class for huggingface_hub that advances the shared bar instead of showing one bar per file."""

    class Part:
        def __init__(self, **_: object) -> None: ...

        def __enter__(self) -> "Part":
            return self

        def __exit__(self, *_: object) -> None: ...

        def close(self) -> None: ...

        def update(self, count: float | None = 1) -> None:
            bar.update(count)

        # xet counts network bytes apart from disk bytes; without this method it would create a second bar.
        def update_transfer(self, count: float | None = 1) -> None: ...

        def set_postfix_str(self, text: str, refresh: bool = False) -> None: ...

        def set_transfer_postfix_str(self, text: str, refresh: bool = False) -> None: ...

    return Part


@contextmanager
def _hushed(quiet: bool) -> Generator[None]:
    """Without a bar, also silence the warning on each retry, unless HF_HUB_VERBOSITY asks for more."""
    log = logging.getLogger("huggingface_hub")
    if not quiet or log.level != logging.WARNING:
        yield
        return
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(logging.WARNING)
