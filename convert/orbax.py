# SPDX-License-Identifier: Apache-2.0
"""Reads and writes the converted form of a model: self-contained, and restorable by any JAX program.

    params/      an Orbax checkpoint of the public tree, independent of any mesh, in the dtypes of the source
    spec.json    the ModelSpec, the format version, and the model's origin
    config.json, generation_config.json, tokenizer and chat template, copied from the source
    modules.json, score/, ...   what makes embeddings, classes and scores of hidden states: see files/pooled.py

Every array is one uncompressed zarr chunk: a file of plain bytes. Orbax restores it like any other checkpoint,
and this module reads it like a safetensors tensor. Orbax itself is needed only to write.
"""

import json
import logging
import math
import os
import re
import stat
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, cast

import numpy as np

from convert.files import output
from convert.files.header import BITS, TensorInfo, quote
from convert.files.reader import OnBytes, Reader, aligned
from convert.plan import COMPONENT_DTYPES, DTYPES, LoadPlan, Piece
from jaxserve import __version__
from jaxserve.errors import CheckpointError, one_line
from jaxserve.models import hf, param_layout, spec_json
from jaxserve.models.spec import ModelSpec
from jaxserve.models.weight import component_at
from jaxserve.quant.scheme import Component

FORMAT = 1
SPEC, PARAMS = "spec.json", "params"

_ZARR_DTYPES = {
    **{"bfloat16": "BF16", "<f2": "F16", "<f4": "F32"},
    **{"|i1": "I8", "|u1": "U8", "<i2": "I16", "<u2": "U16", "<i4": "I32", "<u4": "U32"},  # of quantized weights
    **{"float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "float8_e8m0fnu": "F8_E8M0"},
}
_PLAIN = [name for name, dtype in _ZARR_DTYPES.items() if dtype in DTYPES]
_HINT = "convert the model again"


def is_converted(folder: Path) -> bool:
    return os.path.lexists(folder / SPEC)


# --- reading --------------------------------------------------------------------------------------------------------


def plan(folder: Path) -> LoadPlan:
    """Locate the parameters of a converted folder and check each against the spec."""
    spec = read_spec(folder)
    params = folder / PARAMS
    try:
        wanted = dict(param_layout.leaves(param_layout.abstract_public(spec)))
    except (AttributeError, TypeError, ValueError) as error:  # "8" for 8
        _fail(folder / SPEC, f"contains no valid model spec ({error})")
    names = {param_layout.dotted(path) for path in wanted}
    with _readable(params):
        # Entries without .zarray are Orbax's own files.
        found = {entry.name for entry in os.scandir(params) if os.path.lexists(params / entry.name / ".zarray")}
    if missing := sorted(names - found):
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        _fail(params, f"has no {quote(missing[0])}{more}, which {SPEC} requires")
    if extra := sorted(found - names):
        _fail(params, f"has {quote(extra[0])}, which is not part of the model that {SPEC} describes")
    pieces = {
        path: [Piece(_stored(params, path, leaf.shape, component_at(spec, path)))] for path, leaf in wanted.items()
    }
    return LoadPlan.of(spec, pieces)


def read_spec(folder: Path) -> ModelSpec:
    """The spec of a converted folder."""
    file = folder / SPEC
    content = hf.read_json(file)
    version = content.get("format")
    if not isinstance(version, int) or isinstance(version, bool) or "spec" not in content:
        _fail(file, "was not written by a conversion")
    if version != FORMAT:
        _fail(file, f"has format version {version}, expected {FORMAT}")
    try:
        spec = spec_json.from_json(content["spec"])
    except CheckpointError as error:
        _fail(file, f"contains no valid model spec ({error.problem})")
    except (AttributeError, TypeError, ValueError, ArithmeticError, RecursionError) as error:
        _fail(file, f"contains no valid model spec ({error})")
    if not isinstance(spec, ModelSpec):
        _fail(file, "contains no valid model spec")
    return spec


def _stored(params: Path, path: param_layout.Path, shape: tuple[int, ...], component: Component | None) -> TensorInfo:
    name = param_layout.dotted(path)
    place = params / name
    array = hf.read_json(place / ".zarray")
    if array.get("shape") != list(shape):
        _fail(place, f"has shape {array.get('shape')}, expected {list(shape)}")
    dtype = _ZARR_DTYPES.get(str(array.get("dtype")))
    if dtype is None or (component is None and dtype not in DTYPES):
        _fail(place, f"has dtype {array.get('dtype')!r}, expected one of {', '.join(_PLAIN)}")
    if component is not None and COMPONENT_DTYPES[dtype] != component.dtype:
        _fail(place, f"has dtype {array.get('dtype')!r}, expected {component.dtype}")
    plain = {"zarr_format": 2, "order": "C", "compressor": None, "filters": None, "chunks": list(shape)}
    if any(array.get(key, "absent") != value for key, value in plain.items()):
        _fail(place, "is not stored as one uncompressed chunk")
    file = place / (".".join("0" * len(shape)) or "0")
    with _readable(file):
        status = os.stat(file)
    size = math.prod(shape) * BITS[dtype] // 8
    if not stat.S_ISREG(status.st_mode) or status.st_size != size:
        _fail(file, f"has {status.st_size} bytes, expected {size} for {dtype} of shape {list(shape)}")
    return TensorInfo(dtype, shape, 0, size, file)


@contextmanager
def _readable(path: Path) -> Generator[None]:
    try:
        yield
    except OSError as error:
        _fail(path, f"cannot be read ({(error.strerror or type(error).__name__).lower()})")


def _fail(path: Path, problem: str) -> NoReturn:
    raise CheckpointError(f"{one_line(str(path), limit=1000)}: {one_line(problem, limit=1000)}", _HINT) from None


# --- writing --------------------------------------------------------------------------------------------------------


def write(
    plan: LoadPlan, folder: Path, *, source: dict[str, str | None], dtype: Any = None, progress: OnBytes | None = None
) -> None:
    """Write parameters and spec into a folder, one tensor at a time. `dtype=None` keeps each tensor's dtype."""
    plan = plan if dtype is None else plan.in_dtype(dtype)
    public = param_layout.abstract_public(plan.spec)
    tree: dict[str, Any] = {}
    with Reader(progress) as reader:
        for path, leaf in param_layout.leaves(public):
            # Tensors that are always float32 (sinks, ...) stay float32.
            param_layout.put(
                tree, path, _Leaf(plan, reader, path, leaf.shape, leaf.dtype if dtype else plan.leaf_dtype(path))
            )
        _save(folder / PARAMS, tree)
    content = {"format": FORMAT, "jaxserve": __version__, "source": source, "spec": spec_json.to_json(plan.spec)}
    with _explained(folder):
        (folder / SPEC).write_text(json.dumps(content, indent=1) + "\n")


@dataclass(frozen=True, eq=False)
class _Leaf:
    """An array that is read only when it is written."""

    plan: LoadPlan
    reader: Reader
    path: param_layout.Path
    shape: tuple[int, ...]
    dtype: Any

    def read(self) -> np.ndarray[Any, Any]:
        host = aligned(self.shape, self.dtype)
        self.reader.fill(self.plan.copies(self.path, host, self.shape))
        return host


def _save(place: Path, tree: dict[str, Any]) -> None:
    import orbax.checkpoint as ocp

    class OneByOne(ocp.type_handlers.NumpyHandler):
        """Orbax's numpy handler, which here reads, writes and frees each array before the next."""

        async def serialize(self, values: Sequence[Any], infos: Any, args: Any = None) -> Sequence[Any]:
            for leaf, info, arg in zip(values, infos, args, strict=True):
                for written in await super().serialize([leaf.read()], [info], [arg]):
                    written.result()
            return []

    registry = ocp.type_handlers.create_type_handler_registry((_Leaf, OneByOne(deepcopy_host_arrays=False)))
    with _explained(place.parent), _hushed():
        handler = ocp.PyTreeCheckpointHandler(
            use_ocdbt=False, use_zarr3=False, use_compression=False, type_handler_registry=registry
        )
        with ocp.Checkpointer(handler) as checkpointer:
            checkpointer.save(place.absolute(), args=ocp.args.PyTreeSave(tree))


@contextmanager
def _explained(folder: Path) -> Generator[None]:
    """Convert an OSError during a write, or tensorstore's form of it, to a one-line error."""
    with output.explained(folder):
        try:
            yield
        except (ValueError, RuntimeError) as error:
            if code := re.search(r"os_error_code='(\d+)'", str(error)):
                raise OSError(int(code[1]), os.strerror(int(code[1]))) from error
            problem = f"cannot write {one_line(str(folder), limit=1000)} ({one_line(str(error))})"
            raise CheckpointError(problem, "name another destination") from error


@contextmanager
def _hushed() -> Generator[None]:
    """Silence Orbax's warnings about intentional settings, and its own report of errors that we raise."""
    log = cast(Any, logging.getLogger("absl"))
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(level)
