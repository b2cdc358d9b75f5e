# SPDX-License-Identifier: Apache-2.0
"""Safetensors into the decoder's parameters, straight into their shardings, one tensor at a time.

Before a byte of data is read, the headers decide: every tensor the model needs is there with the right shape, and the
checkpoint has none that the model does not know. Then each engine tensor is put together in one host buffer, handed
to the devices, and forgotten: the host never holds more than the largest.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from convert.header import TensorInfo, quote
from convert.safetensors import read_checkpoint
from jaxserve.errors import CheckpointError, one_line
from jaxserve.models import layout
from jaxserve.models.decoder import Params
from jaxserve.models.registry import Family
from jaxserve.models.spec import Layer, ModelSpec
from jaxserve.models.weights import Rule, View

# What a decoder's weights can be stored as here. Others are quantized forms, and refused.
DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16}

# Buffers that some checkpoints carry and every model can compute: never weights.
COMPUTED = re.compile(r"(rotary_emb\.inv_freq|masked_bias|attn\.bias|attention\.bias|rotary_emb\.(cos|sin)_cached)$")

Progress = Callable[[int], None]  # is told bytes as they are read


@dataclass(frozen=True)
class Piece:
    """A public tensor, or one expert's share of it: where it lies."""

    info: TensorInfo
    view: View | None
    expert: int | None


@dataclass(frozen=True)
class Plan:
    """For every public tensor its pieces: one, or one for each expert."""

    spec: ModelSpec
    pieces: Mapping[layout.Path, Sequence[Piece]]

    @property
    def bytes(self) -> int:
        infos = {id(piece.info): piece.info for pieces in self.pieces.values() for piece in pieces}
        return sum(info.stop - info.start for info in infos.values())


def load(folder: Path, spec: ModelSpec, family: Family, *, dtype: Any, progress: Progress | None = None) -> Params:
    """The parameters in engine layout, on the mesh in context, as `dtype`."""
    return read(plan(folder, spec, family), dtype=dtype, progress=progress)


# --- the plan: names and shapes -------------------------------------------------------------------------------------


def plan(folder: Path, spec: ModelSpec, family: Family) -> Plan:
    tensors = read_checkpoint(folder)
    rules: dict[str, list[Rule]] = {}
    for rule in family.WEIGHTS:
        rules.setdefault(rule.path, []).append(rule)
    used: set[str] = set()
    pieces: dict[layout.Path, list[Piece]] = {}
    for path, value in layout.leaves(layout.abstract_public(spec, jnp.float32)):
        pieces[path] = _find(path, value.shape, spec, rules, tensors, folder, used)
    ignored = getattr(family, "IGNORED", ())
    known = {"lm_head.weight"} if spec.tied else set[str]()
    for name in tensors.keys() - used:
        if name not in known and not COMPUTED.search(name) and not any(re.search(p, name) for p in ignored):
            _fail(tensors[name], name, "is not part of the model that config.json describes")
    return Plan(spec, pieces)


def _find(
    path: layout.Path,
    shape: tuple[int, ...],
    spec: ModelSpec,
    rules: Mapping[str, list[Rule]],
    tensors: Mapping[str, TensorInfo],
    folder: Path,
    used: set[str],
) -> list[Piece]:
    layer = spec.layers[int(path[1])] if path[0] == "layers" else None
    template = layout.dotted(path if layer is None else ("layers", "{layer}", *path[2:]))
    wanted: list[str] = []
    for rule in rules.get(template, ()):
        stacked = "{expert}" in rule.source
        experts: Sequence[int | None] = range(shape[0]) if stacked else [None]
        names = [_name(rule.source, path, expert) for expert in experts]
        wanted.append(names[0])
        if not any(name in tensors for name in names):
            continue
        missing = [name for name in names if name not in tensors]
        if missing:
            _missing(folder, missing[0], path, shape)
        used.update(names)
        each = shape[1:] if stacked else shape
        found = (Piece(tensors[name], rule.view, expert) for name, expert in zip(names, experts, strict=True))
        return [_checked(piece, name, each, layer) for piece, name in zip(found, names, strict=True)]
    if not wanted:
        raise AssertionError(f"no rule of the family gives {layout.dotted(path)}")
    _missing(folder, wanted[0], path, shape)


def _name(source: str, path: layout.Path, expert: int | None) -> str:
    return source.replace("{layer}", str(path[1]) if len(path) > 1 else "").replace("{expert}", str(expert))


def _missing(folder: Path, name: str, path: layout.Path, shape: tuple[int, ...]) -> NoReturn:
    problem = f"tensor {quote(name)} is missing, expected for {layout.dotted(path)} {list(shape)}"
    raise CheckpointError(f"{one_line(str(folder), limit=1000)}: {problem}", "the download may be incomplete")


def _checked(piece: Piece, name: str, shape: tuple[int, ...], layer: Layer | None) -> Piece:
    info = piece.info
    if info.dtype not in DTYPES:
        _fail(info, name, f"has dtype {info.dtype}, expected one of {', '.join(DTYPES)}")
    stand_in = np.broadcast_to(np.zeros((), np.int8), info.shape)
    try:
        seen = stand_in if piece.view is None else piece.view(stand_in, layer)
    except ValueError as error:
        _fail(info, name, f"has shape {list(info.shape)}: {error}")
    if not _regroups(seen.shape, shape):
        found = f"has shape {list(info.shape)}"
        if seen.shape != info.shape:
            found += f", of which {list(seen.shape)} is taken"
        _fail(info, name, f"{found}, expected {list(shape)} or its axes taken together")
    return piece


def _regroups(found: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Whether one shape is the other with neighbouring axes taken together: rows stay rows."""

    def ends(shape: tuple[int, ...]) -> set[int]:
        return {math.prod(shape[:i]) for i in range(len(shape) + 1)}

    a, b = ends(found), ends(wanted)
    return math.prod(found) == math.prod(wanted) and (a <= b or b <= a)


def _fail(info: TensorInfo, name: str, problem: str) -> NoReturn:
    where = one_line(str(info.file), limit=1000)
    raise CheckpointError(f"{where}: tensor {quote(name)} {problem}", "check that config.json belongs to these weights")


# --- the data -------------------------------------------------------------------------------------------------------


def read(plan: Plan, *, dtype: Any, progress: Progress | None = None) -> Params:
    spec, fitted = plan.spec, layout.fit(plan.spec)
    params: Params = {}
    with _Files() as files:
        for path, target in layout.leaves(layout.abstract_params(spec, dtype)):
            host = _aligned(target.shape, target.dtype)
            for part in layout.parts_of(path, target.shape, spec, fitted):
                _fill(host, part, plan, files, progress)
            layout.put(params, path, _to_devices(host, target))
    return params


def _to_devices(host: np.ndarray[Any, Any], target: jax.ShapeDtypeStruct) -> jax.Array:
    if target.sharding is None:
        array = jax.device_put(host, may_alias=True)
    else:
        array = jax.make_array_from_callback(target.shape, target.sharding, lambda index: host[index])
    return array.block_until_ready()  # else the copies of many tensors queue up on the host


def _fill(
    host: np.ndarray[Any, Any], part: layout.Part, plan: Plan, files: "_Files", progress: Progress | None
) -> None:
    into = host[part.index].reshape(part.view)
    pieces = plan.pieces[part.path]
    layer = plan.spec.layers[int(part.path[1])] if part.path[0] == "layers" else None
    for i, piece in enumerate(pieces):
        one, source = (into, part.source) if piece.expert is None else (into[i], part.source[1:])
        files.copy(piece, one, source, layer)
        if progress is not None:
            progress(piece.info.stop - piece.info.start)


def _aligned(shape: tuple[int, ...], dtype: Any) -> np.ndarray[Any, Any]:
    """Host memory that XLA's CPU can take over instead of copying: it wants 64-byte alignment."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    raw = np.zeros(size + 64, np.uint8)  # zeros: rows of padding are zero
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)


class _Files:
    """Open files and their memory maps."""

    def __init__(self) -> None:
        self._maps: dict[Path, np.ndarray[Any, Any]] = {}

    def __enter__(self) -> "_Files":
        return self

    def __exit__(self, *_: object) -> None:
        self._maps.clear()

    def copy(self, piece: Piece, into: np.ndarray[Any, Any], source: tuple[int, ...], layer: Layer | None) -> None:
        data = self._data(piece.info)
        if piece.view is not None:
            data = piece.view(data, layer)
        np.copyto(into, data.reshape(source), casting="unsafe")

    def _data(self, info: TensorInfo) -> np.ndarray[Any, Any]:
        if info.file not in self._maps:
            self._maps[info.file] = np.memmap(info.file, np.uint8, mode="r")
        return self._maps[info.file][info.start : info.stop].view(DTYPES[info.dtype]).reshape(info.shape)
