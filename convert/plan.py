# SPDX-License-Identifier: Apache-2.0
"""Maps a checkpoint's tensors to a model's parameters, by names, dtypes and shapes alone.

Every parameter must exist with the right shape, and the checkpoint must contain nothing unknown to the model. A fault
is found before any data is read, and reported in one line that names the file, the tensor and what was expected.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from convert.files.header import BITS, TensorInfo, quote
from convert.files.reader import Array, TensorCopy, equal_bytes
from convert.files.safetensors import read_checkpoint
from jaxserve.errors import CheckpointError, one_line
from jaxserve.models import param_layout
from jaxserve.models.registry import Family
from jaxserve.models.spec import Layer, ModelSpec
from jaxserve.models.weights import Rule, View

# Supported dtypes of stored weights. The other dtypes of safetensors are quantized formats.
DTYPES: dict[str, Any] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": jnp.dtype(jnp.bfloat16),
}

# Buffers that some checkpoints store although every model computes them: never weights.
COMPUTED = re.compile(r"(^|\.)(rotary_emb\.(inv_freq|cos_cached|sin_cached)|masked_bias|attn\.bias|attention\.bias)$")

_HINT = "check that config.json belongs to these weights"


@dataclass(frozen=True)
class Piece:
    """A public tensor, or one expert's part of it: its location and an optional view of that."""

    info: TensorInfo
    view: View | None = None

    @property
    def dtype(self) -> Any:
        return DTYPES[self.info.dtype]

    def look(self, data: Array, layer: Layer | None) -> Array:
        return data if self.view is None else self.view(data, layer)


@dataclass(frozen=True)
class LoadPlan:
    """The pieces of every public tensor: one, or one per expert."""

    spec: ModelSpec
    pieces: Mapping[param_layout.Path, Sequence[Piece]]

    @property
    def bytes(self) -> int:
        infos = {piece.info for pieces in self.pieces.values() for piece in pieces}
        return sum(info.stop - info.start for info in infos)

    def size(self, dtype: Any = None) -> int:
        """Approximate bytes of the parameters as `dtype`, or as stored."""
        infos = {piece.info for pieces in self.pieces.values() for piece in pieces}
        return sum(math.prod(info.shape) for info in infos) * jnp.dtype(dtype).itemsize if dtype else self.bytes

    def stored_dtype(self) -> Any:
        """The dtype of most bytes. float64 becomes float32, because nothing computes in float64."""
        count: Counter[Any] = Counter()
        for pieces in self.pieces.values():
            for piece in pieces:
                count[piece.dtype] += piece.info.stop - piece.info.start
        return _within_32_bits(max(count, key=lambda dtype: count[dtype]))

    def leaf_dtype(self, path: param_layout.Path) -> Any:
        """A dtype that stores this tensor without loss (except for float64)."""
        dtypes = {_within_32_bits(piece.dtype) for piece in self.pieces[path]}
        return dtypes.pop() if len(dtypes) == 1 else np.dtype(np.float32)

    def copies(self, path: param_layout.Path, into: Array, shape: tuple[int, ...]) -> Iterator[TensorCopy]:
        """Copies of the public tensor at `path`, viewed as `shape` and broadcast, into `into`."""
        layer, pieces = layer_of(self.spec, path), self.pieces[path]
        stack = next(
            n for n in range(len(shape) + 1) if math.prod(shape[:n]) == len(pieces)
        )  # leading axes that index pieces

        def look(piece: Piece, place: Array, data: Array) -> Array:
            return np.broadcast_to(piece.look(data, layer).reshape(shape[stack:]), place.shape)

        for at, piece in zip(np.ndindex(shape[:stack]), pieces, strict=True):
            place = into[*at, ...]
            yield TensorCopy(piece.info, piece.dtype, partial(look, piece, place), place)


def _within_32_bits(dtype: Any) -> Any:
    return np.dtype(np.float32) if dtype == np.float64 else dtype


def layer_of(spec: ModelSpec, path: param_layout.Path) -> Layer | None:
    return spec.layers[int(path[1])] if path[0] == "layers" else None


def plan(folder: Path, spec: ModelSpec, family: Family) -> LoadPlan:
    """The plan of a Hugging Face folder, by the family's WEIGHTS."""
    tensors = read_checkpoint(folder)
    if spec.tied and _heads_differ(family.WEIGHTS, tensors):
        spec = replace(spec, tied=False)
    planner = _Planner(folder, spec, family.WEIGHTS, tensors)
    public = param_layout.leaves(param_layout.abstract_public(spec, jnp.float32))
    pieces = {path: planner.find(path, leaf) for path, leaf in public}
    planner.check_used(getattr(family, "IGNORED", ()))
    return LoadPlan(spec, pieces)


def _heads_differ(weights: Iterable[Rule], tensors: Mapping[str, TensorInfo]) -> bool:
    """Whether embedding and head are both stored and differ: then they are not tied, whatever the config says."""
    stored = {rule.path: tensors[rule.source] for rule in weights if rule.source in tensors}
    embed, head = stored.get("embed.weight"), stored.get("head")
    if embed is None or head is None or head.shape != embed.shape:
        return False
    return head.dtype != embed.dtype or not equal_bytes(embed, head)


class _Planner:
    def __init__(
        self, folder: Path, spec: ModelSpec, weights: Iterable[Rule], tensors: Mapping[str, TensorInfo]
    ) -> None:
        self._folder, self._spec, self._tensors = folder, spec, tensors
        self._used: Counter[str] = Counter()  # number of values used per tensor
        self._rules: dict[str, list[Rule]] = {}
        for rule in weights:
            self._rules.setdefault(rule.path, []).append(rule)
        if spec.tied:  # stored once, under either name
            self._rules["embed.weight"] = self._rules["embed.weight"] + self._rules.get("head", [])

    def find(self, path: param_layout.Path, leaf: jax.ShapeDtypeStruct) -> list[Piece]:
        """The pieces of the public tensor at `path`, by the first rule whose source the checkpoint has."""
        shape, layer = leaf.shape, layer_of(self._spec, path)
        rules = self._rules.get(param_layout.dotted(path if layer is None else ("layers", "{layer}", *path[2:])), ())
        if not rules:
            raise AssertionError(f"no rule of the family gives {param_layout.dotted(path)}")
        if any("{expert}" in rule.source for rule in rules) and shape[0] > len(self._tensors):
            problem = (
                f"config.json has {shape[0]:,} experts, but the checkpoint has only {len(self._tensors):,} tensors"
            )
            raise CheckpointError(f"{_shown(self._folder)}: {problem}", _HINT)
        choices = [(rule, _names(rule, path, shape)) for rule in rules]
        rule, names = next((c for c in choices if any(name in self._tensors for name in c[1])), choices[0])
        each = shape[1:] if "{expert}" in rule.source else shape
        pieces: list[Piece] = []
        for name in names:
            if name not in self._tensors:
                problem = f"tensor {quote(name)} is missing, expected for {param_layout.dotted(path)} {list(shape)}"
                raise CheckpointError(f"{_shown(self._folder)}: {problem}", f"download it again, or {_HINT}")
            piece = Piece(self._tensors[name], rule.view)
            self._used[name] += _check(piece, name, each, layer)
            pieces.append(piece)
        return pieces

    def check_used(self, ignored: Sequence[str]) -> None:
        """Check that every tensor is used, and used completely."""
        for name, count in self._used.items():
            info = self._tensors[name]
            if count < math.prod(info.shape):
                taken = f"of which the model uses {count:,} of {math.prod(info.shape):,} values"
                fail(info, name, f"has shape {list(info.shape)}, {taken}, expected all")
        known = {rule.source for rule in self._rules.get("head", []) if self._spec.tied}  # a copy of the embedding
        patterns = [re.compile(pattern.replace("{layers}", str(len(self._spec.layers)))) for pattern in ignored]
        extra = [
            name
            for name in self._tensors
            if not (name in self._used or name in known or COMPUTED.search(name))
            and not any(pattern.search(name) for pattern in patterns)
        ]
        if extra:
            more = f", and neither are {len(extra) - 1} others" if len(extra) > 1 else ""
            fail(self._tensors[extra[0]], extra[0], f"is not part of the model that config.json describes{more}")


def _names(rule: Rule, path: param_layout.Path, shape: tuple[int, ...]) -> list[str]:
    source = rule.source.replace("{layer}", str(path[1]) if len(path) > 1 else "")
    return [source.replace("{expert}", str(i)) for i in range(shape[0])] if "{expert}" in source else [source]


def _check(piece: Piece, name: str, shape: tuple[int, ...], layer: Layer | None) -> int:
    """Check that the piece can be viewed as `shape`; return how many values of its tensor it uses."""
    info = piece.info
    if info.dtype not in DTYPES:
        kind = "a quantized format" if BITS[info.dtype] <= 8 else "which is not a weight dtype"
        fail(info, name, f"has dtype {info.dtype}, {kind}, expected one of {', '.join(DTYPES)}")
    try:
        seen = piece.look(np.broadcast_to(np.zeros((), np.int8), info.shape), layer)
    except (ValueError, IndexError) as error:
        fail(info, name, f"has shape {list(info.shape)}, expected one that can be viewed as {list(shape)} ({error})")
    if not _regroups(seen.shape, shape):
        found = f"has shape {list(info.shape)}"
        if seen.shape != info.shape:
            found += f", of which {list(seen.shape)} is used"
        fail(info, name, f"{found}, expected {list(shape)}, possibly with adjacent axes merged")
    return seen.size


def _regroups(found: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Whether one shape equals the other with adjacent axes merged, so that rows stay rows."""

    def ends(shape: tuple[int, ...]) -> set[int]:
        return {math.prod(shape[:i]) for i in range(len(shape) + 1)}

    a, b = ends(found), ends(wanted)
    return math.prod(found) == math.prod(wanted) and (a <= b or b <= a)


def fail(info: TensorInfo, name: str, problem: str, hint: str = _HINT) -> NoReturn:
    raise CheckpointError(f"{_shown(info.file)}: tensor {quote(name)} {problem}", hint) from None


def _shown(path: Path) -> str:
    return one_line(str(path), limit=1000)
