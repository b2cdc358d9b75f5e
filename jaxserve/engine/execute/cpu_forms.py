# SPDX-License-Identifier: Apache-2.0
"""How products are computed on this machine's CPU: measured once, and kept beside the compiled programs.

All processes of a machine must agree, or the same prompt could round differently in each. Therefore the first process
to finish writes the rule, and the others read it instead of using what they measured themselves.
"""

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import jaxlib.version

from jaxserve import machine
from jaxserve.engine.execute import jax_start
from jaxserve.models.spec import ModelSpec
from pallas_kernels.on_cpu import matmul
from pallas_kernels.on_cpu.matmul import Forms

_NAME = "cpu-{}.rule"
_MOST = 2**20  # above any rule that `measure` returns


def prepare(folder: Path, spec: ModelSpec) -> None:
    """Make this model's products by the rules of this machine. What is not known yet is measured."""
    chosen = matmul.forms()
    used = {spec.dtype} | {each.scheme.components[0].dtype for each in spec.quantized if each.scheme}
    for name in matmul.MEASURED:
        if name in used:
            chosen = replace(chosen, **{name: _known_or_measured(folder, name)})
    matmul.use_forms(chosen)


def tune(folder: Path, report: Callable[[str], None]) -> Forms:
    """Measure all rules anew, and keep them for engines that start from now on."""
    chosen = Forms()
    for name in matmul.MEASURED:
        report(f"measuring products in {name}")
        place_of(folder, name).unlink(missing_ok=True)
        chosen = replace(chosen, **{name: _known_or_measured(folder, name)})
    return chosen


def place_of(folder: Path, name: str) -> Path:
    """The file of a dtype's rule on this machine, with these libraries."""
    here = (machine.processor(), jax_start.cpu_threads())
    about = (*here, jaxlib.version.__version__, os.environ.get("XLA_FLAGS"), name)
    return folder / _NAME.format(hashlib.sha256(repr(about).encode()).hexdigest()[:32])


def _known_or_measured(folder: Path, name: str) -> int:
    place = place_of(folder, name)
    known = _read(place)
    if known is not None:
        return known
    with contextlib.suppress(OSError):
        place.unlink(missing_ok=True)  # broken
    measured = matmul.measure(name)
    with contextlib.suppress(OSError):  # the disk is full, or another process was faster
        _write(place, measured)
    written = _read(place)
    return measured if written is None else written


def _read(place: Path) -> int | None:
    try:
        rule = int(place.read_text())
    except (OSError, ValueError):
        return None
    return rule if 0 <= rule <= _MOST else None


def _write(place: Path, rule: int) -> None:
    """Write the file whole, unless it exists."""
    handle, partial = tempfile.mkstemp(dir=place.parent)
    try:
        with os.fdopen(handle, "w") as opened:
            opened.write(str(rule))
        os.link(partial, place)
    finally:
        os.unlink(partial)
