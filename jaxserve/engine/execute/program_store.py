# SPDX-License-Identifier: Apache-2.0
"""Stores executables of the engine's programs on disk, so that the next start neither traces nor compiles them.

jax's own cache needs the lowered program first, and tracing and lowering take most of a warm start: 7 of the demo's
12.5 s on two cores. Here the key covers everything that a program is made from: its function, static arguments and
shapes, the devices, this code, the libraries and every jax setting. When in doubt, keys differ and it is compiled.

Files are unpickled and their content is executed, so only files owned by this user or root that no other user can write
are read.
"""

import contextlib
import functools
import hashlib
import os
import pickle
import platform
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import flax
import jax
import jaxlib.version
import numpy as np
from jax.experimental import serialize_executable

import jaxserve
import pallas_kernels
from jaxserve import machine
from jaxserve.engine.execute import jax_start
from pallas_kernels.on_cpu import matmul

SUFFIX, PARTIAL = ".executable", ".partial"
DAYS = 30  # a file not read for this long is deleted
_FORM = 2  # version of the file format


def open_store(folder: str, report: Callable[[str], None]) -> "Store | None":
    """None if storing is turned off or not possible."""
    if not folder or jax.process_count() > 1:  # the processes of a multi-process run must compile together
        return None
    if jax.config.jax_compilation_cache_dir is not None or not _certain():
        return None
    place = place_of(folder)
    try:
        place.mkdir(parents=True, exist_ok=True, mode=0o700)
        usable = os.access(place, os.W_OK)
    except OSError:
        usable = False
    if not usable:
        report(f"compiled programs are not stored: {place} is not writable (see compilation_cache_dir)")
        return None
    return Store(place)


def place_of(folder: str) -> Path:
    """The folder that compilation_cache_dir stands for: in XDG_CACHE_HOME, if that is set, instead of ~/.cache."""
    cache, path = os.environ.get("XDG_CACHE_HOME"), Path(folder)
    if cache and path.parts[:2] == ("~", ".cache"):
        path = Path(cache, *path.parts[2:])
    return path.expanduser()


def _certain() -> bool:
    """Whether the key can cover everything that programs are made from: not if source files have changed since import,
    nor if XLA reads its flags from a file."""
    flags = os.environ.get("XLA_FLAGS", "").strip()
    return sources() == LOADED and (not flags or flags.startswith("--"))


class Store:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._prune()

    def place(self, program: str) -> Path:
        """The program's file under the current settings. These may change: compare it before compiling and `save`."""
        return self.folder / f"{hashlib.sha256(f'{environment()}\n{program}'.encode()).hexdigest()}{SUFFIX}"

    def load(self, file: Path, devices: Sequence[Any]) -> tuple[Any, int] | None:
        """The executable on these devices, and what `save` got with it; None if there is no usable one."""
        try:
            with file.open("rb") as opened:
                if not _trusted(os.fstat(opened.fileno())):
                    return None
                content = opened.read()
        except OSError:  # absent, or not readable
            return None
        try:
            payload, in_tree, out_tree, extra = pickle.loads(content)
            found = serialize_executable.deserialize_and_load(
                payload, in_tree, out_tree, backend=devices[0].client, execution_devices=devices
            )
        except Exception:  # truncated, of another format, or refused by a library: the same as absent
            with contextlib.suppress(OSError):
                file.unlink()
            return None
        with contextlib.suppress(OSError):
            os.utime(file)
        return found, extra

    def save(self, file: Path, executable: Any, extra: int) -> None:
        """Write the file atomically. If that fails, the next start compiles again. `extra`: the bytes that a run takes
        beside its arguments, which the executable no longer knows once it is loaded."""
        if jax.config.jax_compilation_cache_dir is not None:
            # An executable from jax's own cache cannot be serialized again: on a CPU it then lacks its functions, and
            # running it fails (NOT_FOUND).
            return
        partial = ""
        try:
            content = pickle.dumps((*serialize_executable.serialize(executable), extra))
            handle, partial = tempfile.mkstemp(dir=self.folder, suffix=PARTIAL)
            with os.fdopen(handle, "wb") as opened:
                opened.write(content)
            os.replace(partial, file)
        except Exception:  # the executable cannot be serialized, or the disk is full
            with contextlib.suppress(OSError):
                os.unlink(partial)

    def _prune(self) -> None:
        for file in (*self.folder.glob(f"*{SUFFIX}"), *self.folder.glob(f"*{PARTIAL}")):
            try:
                if file.stat().st_mtime < time.time() - DAYS * 86400:
                    file.unlink()
            except OSError:
                continue  # another process has deleted it


def _trusted(file: os.stat_result) -> bool:
    return file.st_uid in (0, os.geteuid()) and not file.st_mode & 0o022


def environment() -> str:
    """Everything but the program itself that two starts must have in common."""
    # Not cached: a program may change settings between two engines, some of them only for this thread.
    known = sorted(jax.config.values.items())
    settings = {name: getattr(jax.config, name, value) for name, value in known if "cache" not in name}
    flags = {name: os.environ.get(name) for name in ("XLA_FLAGS", "CUDA_VISIBLE_DEVICES")}
    return repr((_FORM, settings, flags, jax_start.cpu_threads(), _machine(), matmul.forms(), LOADED))


@functools.cache
def _machine() -> tuple[object, ...]:
    """Versions of libraries, and the hardware properties that compilers use."""
    versions = (jax.__version__, jaxlib.version.__version__, flax.__version__, np.__version__)
    devices = [(device.id, device.device_kind) for device in jax.devices()]
    return (versions, platform.python_version(), jax.devices()[0].client.platform_version, devices, machine.processor())


def sources(*roots: Path) -> str:
    """A digest of the code that programs are traced from, as currently on disk."""
    digest = hashlib.sha256()
    for root in map(str, roots or (Path(package.__file__ or "").parent for package in (jaxserve, pallas_kernels))):
        for folder, folders, names in os.walk(root):  # pathlib would take five times as long, at every start
            folders[:] = sorted(name for name in folders if name != "__pycache__")
            for name in sorted(names):
                if name.endswith(".py") or (name.endswith(".json") and folder == root):
                    place = os.path.join(folder, name)
                    with open(place, "rb") as file:
                        digest.update(f"{place[len(root) :]}\n".encode() + file.read())
    return digest.hexdigest()


LOADED = sources()  # as it was when this module was imported
