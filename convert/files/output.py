# SPDX-License-Identifier: Apache-2.0
"""Creates an output folder atomically: it appears complete or not at all.

The folder is written beside its destination as NAME.converting, synced to disk and renamed. A marker file in it is
locked while the writer lives, which distinguishes the leftovers of a dead writer from a running one whatever their
process ids. A folder without the marker is not ours and is never touched.
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

type Ours = Callable[[Path], bool]  # whether a folder may be overwritten


def check(destination: Path, *, overwrite: bool, ours: Ours) -> None:
    """Check that the destination can be created. Cheap: called before the work and again at its end."""
    shown = _shown(destination)
    if destination.name in ("", ".."):
        raise CheckpointError(f"{shown} is not a valid destination folder", _HINT_PLACE)
    parent = destination.parent
    if not parent.is_dir():
        raise CheckpointError(f"folder {_shown(parent)} for {shown} does not exist", "create it first")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise CheckpointError(f"folder {_shown(parent)} is not writable", _HINT_PLACE)
    if not os.path.lexists(destination):
        return
    if destination.is_symlink() or not destination.is_dir():
        raise CheckpointError(f"{shown} exists and is not a folder", _HINT_PLACE)
    if not os.listdir(destination):
        return
    if not ours(destination):
        raise CheckpointError(f"{shown} exists and is not a converted model, so it is not overwritten", _HINT_PLACE)
    if not overwrite:
        raise CheckpointError(f"{shown} already exists", f"{_HINT_PLACE}, or replace it with --overwrite")


@contextmanager
def folder(destination: Path, *, overwrite: bool, ours: Ours) -> Generator[Path]:
    """Yield a new folder to write into. On success it becomes `destination`; on an exception it is removed."""
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
    """Remove the leftovers of a writer that died."""
    if not os.path.lexists(made):
        return
    shown = _shown(made)
    try:
        mark = os.open(made / _MARK, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        raise CheckpointError(f"{shown} exists and was not created by a conversion", "move it away") from None
    try:
        fcntl.flock(mark, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise CheckpointError(f"another conversion is writing {shown}", "wait until it ends") from None
    else:
        shutil.rmtree(made)
    finally:
        os.close(mark)


def _rename(made: Path, destination: Path, ours: Ours) -> None:
    old: Path | None = None
    if destination.is_dir() and os.listdir(destination):
        old = destination.with_name(f"{destination.name}.replaced")
        if ours(old):  # an earlier replacement died after this point
            shutil.rmtree(old)
        os.rename(destination, old)  # fails if something else is there
    try:
        os.rename(made, destination)  # also replaces an empty folder
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
    """Convert an OSError during a write to a one-line error."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise full(destination) from error
        reason = (error.strerror or type(error).__name__).lower()
        raise CheckpointError(f"cannot write {_shown(destination)} ({reason})", _HINT_PLACE) from error


def full(destination: Path) -> CheckpointError:
    return CheckpointError(f"the disk of {_shown(destination)} is full", f"free disk space, or {_HINT_PLACE}")


def check_room(destination: Path, needed: int) -> None:
    disk = shutil.disk_usage(destination.parent)
    if disk.total and needed > disk.free:
        problem = f"{_shown(destination)} needs {-(-needed // 10**6):,} MB"
        raise CheckpointError(f"{problem}, but its disk has {disk.free // 10**6:,} MB free", _HINT_PLACE)


def _shown(path: Path) -> str:
    return one_line(str(path), limit=1000)
