# SPDX-License-Identifier: Apache-2.0
"""Reads tensors from files into host arrays of any strides and dtype. Independent of models.

Data is read with pread, not through a memory map: mapped pages count as this process's memory, and a file that shrinks
while mapped kills the process. The file is mapped anyway, only to give views addresses: a view's strides determine
which spans to read, directly into place or, if strides or dtypes differ, through a buffer that fits in the CPU cache.
Several threads read the spans of one tensor.
"""

import math
import mmap
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.array_utils import byte_bounds

from convert.files.header import TensorInfo
from jaxserve import machine
from jaxserve.errors import CheckpointError, one_line

type Array = np.ndarray[Any, Any]
type OnBytes = Callable[[int], object]  # called with the number of bytes read

SPAN = 4 << 20  # with 1 MB, Python overhead made loading a third slower
HOLE = 1 << 16  # gaps of at least this size are skipped, smaller ones are read too
WORKERS = min(8, machine.cpus())


@dataclass(frozen=True)
class TensorCopy:
    """Copies `look(tensor)` to `into`, with cast and broadcast as needed."""

    info: TensorInfo
    dtype: Any
    look: Callable[[Array], Array]
    into: Array
    computes: bool = False  # `look` returns computed values, not a view: threads call it, with what was read


class Reader:
    def __init__(self, progress: OnBytes | None = None) -> None:
        self._pool = ThreadPoolExecutor(WORKERS, thread_name_prefix="reader")
        self._progress = progress
        self._own = threading.local()

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def fill(self, copies: Iterable[TensorCopy]) -> None:
        """Make the copies, opening the files that they need."""
        with ExitStack() as stack:
            files: dict[Path, _File] = {}
            tasks: list[_Task | _Computation] = []
            for copy in copies:
                path = copy.info.file
                if path not in files:
                    files[path] = stack.enter_context(_File(path))
                tasks += _tasks(files[path], copy)
            several = len(tasks) > 1
            for size in self._pool.map(self._do, tasks) if several else map(self._do, tasks):
                if self._progress is not None:
                    self._progress(size)

    def _do(self, task: "_Task | _Computation") -> int:
        return task.run(self._buffer)

    def _buffer(self, size: int) -> Array:
        """This thread's buffer for data that cannot be read directly into place."""
        held: Array | None = getattr(self._own, "buffer", None)
        if held is None or held.size < size:
            self._own.buffer = held = np.empty(max(size, SPAN), np.uint8)
        return held[:size]


def aligned(shape: tuple[int, ...], dtype: Any) -> Array:
    """A zeroed array (zeros are the padding), 64-byte aligned so that XLA's CPU backend can alias it without a copy."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    raw = np.zeros(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)


def equal_bytes(one: TensorInfo, other: TensorInfo) -> bool:
    """Whether two tensors of equal size have equal bytes. Stops at the first difference."""
    with _File(one.file) as first, _File(other.file) as second:
        for at in range(0, one.stop - one.start, SPAN):
            size = min(SPAN, one.stop - one.start - at)
            a, b = np.empty((2, size), np.uint8)
            first.read(one.start + at, a)
            second.read(other.start + at, b)
            if not np.array_equal(a, b):
                return False
    return True


def read_bytes(info: TensorInfo) -> Array:
    """The bytes of a small tensor."""
    with _File(info.file) as file:
        into = np.empty(info.stop - info.start, np.uint8)
        file.read(info.start, into)
    return into


class _File:
    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise _broken(path, (error.strerror or type(error).__name__).lower()) from None
        try:
            self.bytes: Array = np.frombuffer(mmap.mmap(self.fd, 0, access=mmap.ACCESS_READ), np.uint8)
        except (OSError, ValueError) as error:  # ValueError: empty
            os.close(self.fd)
            raise _broken(path, str(error)) from None
        self.start = byte_bounds(self.bytes)[0]

    def __enter__(self) -> "_File":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.fd)  # the map is freed with the last array that views it

    def tensor(self, info: TensorInfo, dtype: Any) -> Array:
        if info.stop > self.bytes.size:
            raise _broken(self.path, "the file was truncated")
        return self.bytes[info.start : info.stop].view(dtype).reshape(info.shape)

    def read(self, offset: int, into: Array) -> None:
        rest = memoryview(into)
        while rest:
            try:
                count = os.preadv(self.fd, [rest], offset)
            except OSError as error:
                raise _broken(self.path, (error.strerror or type(error).__name__).lower()) from None
            if count == 0:
                raise _broken(self.path, "the file was truncated")
            rest, offset = rest[count:], offset + count


def _broken(path: Path, why: str) -> CheckpointError:
    return CheckpointError(f"cannot read {one_line(str(path), limit=1000)} ({why})", "check the file and its disk")


@dataclass(frozen=True, eq=False)
class _Task:
    """One span of a file. `source` only locates the values."""

    file: _File
    source: Array
    into: Array

    def run(self, buffer: Callable[[int], Array]) -> int:
        source, into = self.source, self.into
        start, stop = byte_bounds(source)
        offset = start - self.file.start
        with np.errstate(over="ignore"):
            self._copy(offset, start, stop, buffer)
        _check_range(into, source.dtype, self.file)
        return source.nbytes

    def _copy(self, offset: int, start: int, stop: int, buffer: Callable[[int], Array]) -> None:
        source, into = self.source, self.into
        if not 0 <= offset <= stop - self.file.start <= self.file.bytes.size:
            np.copyto(into, source, casting="unsafe")  # a copy, not a view: its values are already read
        elif source.dtype == into.dtype and source.flags.c_contiguous and into.flags.c_contiguous:
            self.file.read(offset, into.reshape(-1).view(np.uint8))
        else:
            held = buffer(stop - start)
            self.file.read(offset, held)
            first = source.__array_interface__["data"][0] - start
            seen = np.ndarray(source.shape, source.dtype, held, first, source.strides)
            np.copyto(into, seen, casting="unsafe")


@dataclass(frozen=True, eq=False)
class _Computation:
    """A tensor whose values are computed from its bytes."""

    file: _File
    copy: TensorCopy

    def run(self, buffer: Callable[[int], Array]) -> int:
        info, into = self.copy.info, self.copy.into
        held = buffer(info.stop - info.start)
        self.file.read(info.start, held)
        values = self.copy.look(held.view(self.copy.dtype).reshape(info.shape))
        with np.errstate(over="ignore"):
            np.copyto(into, values, casting="unsafe")
        _check_range(into, values.dtype, self.file)
        return held.nbytes


def _check_range(into: Array, given: Any, file: _File) -> None:
    if into.dtype == np.float16 and given != np.float16 and np.isinf(into).any():
        problem = f"{one_line(str(file.path), limit=1000)} contains values outside the range of float16"
        raise CheckpointError(problem, "choose bfloat16 or float32")


def _tasks(file: _File, copy: TensorCopy) -> "Iterator[_Task | _Computation]":
    if copy.computes:
        yield _Computation(file, copy)
        return
    source = copy.look(file.tensor(copy.info, copy.dtype))
    if source.size == 0:
        return
    # Widest strides first. Broadcast axes (stride 0) come last, so their data is read once.
    order = sorted(range(source.ndim), key=lambda axis: -abs(source.strides[axis]))
    source = source.transpose(order)
    into = copy.into.transpose(order)
    for part, place in _spans(source, into):
        yield _Task(file, part, place)


def _spans(source: Array, into: Array) -> Iterator[tuple[Array, Array]]:
    """Split the copy into spans of at most SPAN file bytes, where possible."""
    start, stop = byte_bounds(source)
    inner = byte_bounds(source[0, ...]) if source.ndim else (start, stop)
    size, stride = inner[1] - inner[0], abs(source.strides[0]) if source.ndim else 0
    holes = stride > size >= HOLE
    if source.ndim == 0 or (stop - start <= SPAN and not holes):
        yield source, into
        return
    rows = 1 if holes else max(1, SPAN // max(stride, 1))
    for i in range(0, len(source), rows):
        if rows == 1:
            yield from _spans(source[i, ...], into[i, ...])  # `...` keeps single values as views
        else:
            yield source[i : i + rows], into[i : i + rows]
