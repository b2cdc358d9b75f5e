# SPDX-License-Identifier: Apache-2.0
"""What a user names as a model, turned into a local folder: a folder as it is, a hub id by download.

huggingface_hub does the downloading, into its own cache, so its settings (HF_TOKEN, HF_HOME, HF_ENDPOINT, ...) hold.
Decided here: which files, all of one commit, in which order, and one line for each way to fail.

The order is what tells a complete folder from an interrupted download without asking the hub: config.json comes last
of the small files, weights after it, and a branch's entry in the cache moves only when all that was asked for is there.
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
from convert.files.safetensors import read_index
from jaxserve import __version__
from jaxserve.errors import CheckpointError

if TYPE_CHECKING:
    from huggingface_hub import HfApi

__all__ = ["SMALL", "TEMPLATE", "fetch"]

_CONFIG = "config.json"
# What a model folder is read for besides its config and weights.
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
}
TEMPLATE = re.compile(r"additional_chat_templates/\w[\w.-]*\.jinja")
_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_FOREIGN = (".bin", ".gguf", ".pth", ".pt", ".ckpt", ".h5", ".msgpack", ".onnx", ".safetensors")

# Stricter than paths and URLs need, so that no id or revision can mean another place in either.
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
    """The local folder of the model `source`: itself a folder, or a hub id such as org/name.

    A folder of that name wins over the hub. `revision` is a branch, tag or commit of a hub model, main unless given;
    it is resolved once, and the folder that is returned bears the name of its commit. `check` is called with the
    folder before any weights are downloaded, and stops the download by raising. `weights=False` leaves them out.
    `offline`, or HF_HUB_OFFLINE=1, uses the cache alone. `progress` None shows a bar on a terminal.
    """
    folder = _local_folder(source)
    if folder is not None and revision is not None:
        raise CheckpointError(f"{quote(source)} is a local folder and has no revisions", "leave the revision out")
    if folder is None:
        model = _hub_model(source, revision=revision, cache_dir=cache_dir)
        if offline or _offline_by_env():
            folder = _from_cache(model, weights=weights)
        else:
            return _from_hub(model, weights=weights, progress=progress, check=check)
    if check:
        check(folder)
    return folder


# -- what was named


def _local_folder(source: str) -> Path | None:
    """The folder that `source` names; None where it must name a hub model."""
    path = os.path.expanduser(source)
    hint = "check the path, or name a hub model as org/name"
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as error:  # ValueError: a NUL
        if not _LOOKS_LIKE_PATH.match(source):
            return None
        if isinstance(error, FileNotFoundError | NotADirectoryError):
            raise CheckpointError(f"there is no folder {quote(source)}", hint) from None
        raise CheckpointError(f"the folder {quote(source)} cannot be read ({reason(error)})", hint) from None
    if not stat.S_ISDIR(mode):
        raise CheckpointError(f"{quote(source)} is a file, not a model folder", "name the folder that it lies in")
    if not os.path.isfile(os.path.join(path, _CONFIG)):
        problem = f"the folder {quote(source)} has no {_CONFIG}"
        hint = "name a folder that holds a Hugging Face model (a folder goes before a hub model of its name)"
        raise CheckpointError(problem, hint)
    return Path(path)


def _hub_model(source: str, *, revision: str | None, cache_dir: Path | None) -> HubModel:
    if not _HUB_ID.fullmatch(source):
        problem = f"{quote(source)} is neither a folder here nor a possible name of a hub model"
        raise CheckpointError(problem, "check the path, or name a hub model as org/name")
    revision = "main" if revision is None else revision
    if not _REVISION.fullmatch(revision):
        problem = f"{quote(revision)} cannot be a revision"
        raise CheckpointError(problem, f"name a branch, a tag or a commit of {quote(source)}")
    from huggingface_hub import constants

    # huggingface_hub reads its environment once, at import; whoever sets the endpoint later means it too.
    endpoint = (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")
    cache = Path(cache_dir or constants.HF_HUB_CACHE).expanduser().resolve()
    return HubModel(source, revision, endpoint, cache)


def _offline_by_env() -> bool:
    from huggingface_hub import is_offline_mode

    value = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or ""
    return is_offline_mode() or value.upper() in {"1", "ON", "YES", "TRUE"}


# -- from the cache


def _from_cache(model: HubModel, *, weights: bool) -> Path:
    hint = "fetch it once while not offline"
    commit = model.revision
    if not _COMMIT.fullmatch(commit):
        with suppress(OSError):
            commit = (model.place / "refs" / model.revision).read_text(errors="replace").strip()
    folder = model.folder(commit)
    if not _COMMIT.fullmatch(commit) or not os.path.isdir(folder):
        raise CheckpointError(f"{model} is not in the cache {shown(model.cache)}, and this is offline", hint)
    missing = [] if os.path.isfile(folder / _CONFIG) else [_CONFIG]
    if weights and not os.path.isfile(folder / _SINGLE):
        if os.path.isfile(folder / _INDEX):
            shards = _shards(folder / _INDEX)
            missing += [shard for shard in shards if not os.path.isfile(folder / shard)]
        else:
            missing.append(_SINGLE)
    if missing:
        problem = f"{model} is incomplete in the cache {shown(model.cache)}, and this is offline: no {few(missing)}"
        raise CheckpointError(problem, hint)
    return folder


def _shards(index: Path) -> list[str]:
    return sorted(set(read_index(index).values()))


# -- from the hub


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
        raise CheckpointError(f"{model} has no {_CONFIG}", "name a repository that holds a Hugging Face model")

    def download(names: Iterable[str], what: str) -> None:
        label = f"{model.id} {what}" if progress else None
        _download(api, model, commit, {name: sizes[name] for name in names}, label=label)

    small = sorted(name for name in sizes if name in SMALL or TEMPLATE.fullmatch(name))
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
                problem = f"{model} lacks {few(absent)}, which its {_INDEX} names"
                raise CheckpointError(problem, "choose another revision, or tell the owner of the repository")
        download(names, "weights")
    _remember(model, commit)
    return folder


def _listing(api: "HfApi", model: HubModel) -> tuple[str, dict[str, int | None]]:
    """The commit that the revision stands for now, and the files it has with their sizes."""
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
        raise CheckpointError(f"{model.endpoint} names no commit for {model}", HINT_ENDPOINT)
    return commit, sizes


def _refuse_for_weights(model: HubModel, names: Iterable[str]) -> NoReturn:
    found: dict[str, str] = {}
    for name in names:
        if (suffix := Path(name).suffix.lower()) in _FOREIGN:
            found.setdefault(suffix, name)
    problem = f"{model} has no {_SINGLE} and no {_INDEX}"
    problem += f", only {few(list(found.values()))}" if found else ", and no other weights"
    hint = "name a repository that holds weights as safetensors"
    if ".bin" in found:
        hint = "choose a revision with safetensors (often refs/pr/N), or save it so with transformers' save_pretrained"
    elif ".gguf" in found:
        hint = "name the repository that the GGUF files were made from"
    raise CheckpointError(problem, hint)


def _download(
    api: "HfApi", model: HubModel, commit: str, sizes: Mapping[str, int | None], *, label: str | None
) -> None:
    """Those of these files that the cache lacks, one after the other so that Ctrl-C ends them at once."""
    from huggingface_hub.utils import tqdm

    get = cast(Any, api).hf_hub_download  # its annotations stop short at tqdm's
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
                _discard(path)  # the machine went down before the data reached its disk
            with explained(model, file=name):
                get(model.id, name, revision=commit, cache_dir=model.cache, tqdm_class=_part_of(bar))
            if not _complete(path, size):
                _discard(path)
                problem = f"{quote(name)} of {model} did not arrive as {model.endpoint} lists it"
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
    """What this revision stands for, for the next time offline. A cache may be read-only: then it is not noted."""
    if model.revision == commit:
        return
    ref = model.place / "refs" / model.revision
    written = ref.with_name(f"{ref.name}.{os.getpid()}.tmp")
    with suppress(OSError):
        ref.parent.mkdir(parents=True, exist_ok=True)
        written.write_text(commit)
        os.replace(written, ref)


def _part_of(bar: Any) -> type[Any]:
    """A class for the bar of one file, as huggingface_hub wants one, that moves the bar of them all."""

    class Part:
        def __init__(self, **_: object) -> None: ...

        def __enter__(self) -> "Part":
            return self

        def __exit__(self, *_: object) -> None: ...

        def close(self) -> None: ...

        def update(self, count: float | None = 1) -> None:
            bar.update(count)

        # Bytes on the wire, which xet counts apart from bytes on disk. Where this is lacking, a second bar is made.
        def update_transfer(self, count: float | None = 1) -> None: ...

        def set_postfix_str(self, text: str, refresh: bool = False) -> None: ...

        def set_transfer_postfix_str(self, text: str, refresh: bool = False) -> None: ...

    return Part


@contextmanager
def _hushed(quiet: bool) -> Generator[None]:
    """Without a bar nobody watches: no warnings on each retry either, unless HF_HUB_VERBOSITY asks for more."""
    log = logging.getLogger("huggingface_hub")
    if not quiet or log.level != logging.WARNING:
        yield
        return
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(logging.WARNING)
