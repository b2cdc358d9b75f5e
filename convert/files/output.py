# SPDX-License-Identifier: Apache-2.0
"""A folder that appears whole or not at all. Knows nothing of what is written into it.

It is written beside its place, as NAME.converting, flushed to the disk and renamed. A file in there is locked for as
long as the writer lives, so what a writer that died has left is told from one that is at work, whatever its process
number is now; and what does not have that file is not ours and never touched.
"""

import errno
import fcntl
import os
import shutil
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from pathlib import Path

from jaxserve.errors import CheckpointError, one_line

_MARK = ".jaxserve-converting"
_HINT_PLACE = "name another destination"

type Ours = Callable[[Path], bool]  # whether a folder is one that may be overwritten


def check(destination: Path, *, overwrite: bool, ours: Ours) -> None:
    """That a folder may be put there. Cheap: for before the work, and once more at its end."""
    shown = _shown(destination)
    if destination.name in ("", ".."):
        raise CheckpointError(f"{shown} is no place for a new folder", _HINT_PLACE)
    parent = destination.parent
    if not parent.is_dir():
        raise CheckpointError(f"there is no folder {_shown(parent)} to put {shown} in", "make it first")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise CheckpointError(f"the folder {_shown(parent)} is not writable", _HINT_PLACE)
    if not os.path.lexists(destination):
        return
    if destination.is_symlink() or not destination.is_dir():
        raise CheckpointError(f"{shown} exists and is no folder", _HINT_PLACE)
    if not os.listdir(destination):
        return
    if not ours(destination):
        raise CheckpointError(f"{shown} exists, and is no converted model: it is left alone", _HINT_PLACE)
    if not overwrite:
        raise CheckpointError(f"{shown} exists", f"{_HINT_PLACE}, or replace it with --overwrite")


@contextmanager
def folder(destination: Path, *, overwrite: bool, ours: Ours) -> Generator[Path]:
    """A new folder to write into; if nothing is raised it becomes `destination`, else it is gone."""
    check(destination, overwrite=overwrite, ours=ours)
    made = destination.with_name(f"{destination.name}.converting")
    with explained(destination):
        _clear(made)
        made.mkdir()
        mark = os.open(made / _MARK, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(mark, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield made
        check(destination, overwrite=overwrite, ours=ours)
        with explained(destination):
            _sync(made)
            _rename(made, destination, ours)
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise
    finally:
        os.close(mark)


def _clear(made: Path) -> None:
    """Removes what a writer that died has left."""
    if not os.path.lexists(made):
        return
    shown = _shown(made)
    try:
        mark = os.open(made / _MARK, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        raise CheckpointError(f"{shown} is in the way, and was not left by a conversion", "move it away") from None
    try:
        fcntl.flock(mark, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise CheckpointError(f"another conversion is writing {shown}", "wait for it") from None
    else:
        shutil.rmtree(made)
    finally:
        os.close(mark)


def _rename(made: Path, destination: Path, ours: Ours) -> None:
    old: Path | None = None
    if destination.is_dir() and os.listdir(destination):
        old = destination.with_name(f"{destination.name}.replaced")
        if ours(old):  # a replacement died after this point
            shutil.rmtree(old)
        os.rename(destination, old)  # fails if something else is there
    try:
        os.rename(made, destination)  # over an empty folder, too
    except OSError:
        if old:
            os.rename(old, destination)
        raise
    with suppress(OSError):
        os.unlink(destination / _MARK)
    _sync_one(destination.parent)
    if old:
        shutil.rmtree(old, ignore_errors=True)


def _sync(made: Path) -> None:
    for place, _, files in os.walk(made):
        for name in files:
            _sync_one(Path(place, name))
        _sync_one(Path(place))


def _sync_one(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def explained(destination: Path) -> Generator[None]:
    """One line for whatever the system has against a write."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise full(destination) from error
        reason = (error.strerror or type(error).__name__).lower()
        raise CheckpointError(f"{_shown(destination)} cannot be written ({reason})", _HINT_PLACE) from error


def full(destination: Path) -> CheckpointError:
    return CheckpointError(f"the disk of {_shown(destination)} is full", f"free some space, or {_HINT_PLACE}")


def check_room(destination: Path, needed: int) -> None:
    disk = shutil.disk_usage(destination.parent)
    if disk.total and needed > disk.free:
        problem = f"{_shown(destination)} needs {-(-needed // 10**6):,} MB"
        raise CheckpointError(f"{problem}, and its disk has {disk.free // 10**6:,} MB free", _HINT_PLACE)


def _shown(path: Path) -> str:
    return one_line(str(path), limit=1000)
