# SPDX-License-Identifier: Apache-2.0
"""Maps a checkpoint's tensors to a model's parameters, by names, dtypes and shapes alone.

Every parameter must exist with the right shape, and the checkpoint must contain nothing unknown to the model. A fault
is found before any data is read, and reported in one line that names the file, the tensor and what was expected.
"""

import logging
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, Self

import jax
import jax.numpy as jnp
import numpy as np

from convert.files import safetensors
from convert.files.header import BITS, TensorInfo, quote
from convert.files.reader import Array, TensorCopy, equal_bytes, read_bytes
from convert.files.safetensors import read_checkpoint
from convert.gguf import names as gguf
from convert.gguf.names import BlockTensor
from jaxserve.errors import CheckpointError, one_line
from jaxserve.models import online, param_layout, registry
from jaxserve.models.registry import Family
from jaxserve.models.spec import Layer, ModelSpec
from jaxserve.models.weight import component_at
from jaxserve.models.weights import Rule, View
from jaxserve.quant.formats.format import Format, Source
from jaxserve.quant.scheme import Component

# Supported dtypes of stored weights. The others hold components of quantized weights.
DTYPES: dict[str, Any] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": jnp.dtype(jnp.bfloat16),
}
COMPONENT_DTYPES: dict[str, Any] = DTYPES | {
    **{f"{sign}{bits}": np.dtype(f"{sign}{bits // 8}".lower()) for sign in "IU" for bits in (8, 16, 32, 64)},
    "F8_E4M3": jnp.dtype(jnp.float8_e4m3fn),
    "F8_E5M2": jnp.dtype(jnp.float8_e5m2),
    "F8_E8M0": jnp.dtype(jnp.float8_e8m0fnu),
}

# Buffers that some checkpoints store although every model computes them: never weights.
COMPUTED = re.compile(r"(^|\.)(rotary_emb\.(inv_freq|cos_cached|sin_cached)|masked_bias|attn\.bias|attention\.bias)$")

logger = logging.getLogger(__name__)

_HINT = "check that config.json belongs to these weights"


@dataclass(frozen=True)
class Piece:
    """A public tensor, or one expert's part of it: its location and an optional view of it. A packed component of a
    quantized weight is unpacked first, with the small tensors in `others`, after its `problem` was looked for. A
    component that the checkpoint lacks is encoded from the plain weight."""

    info: TensorInfo
    view: View | None = None
    unpack: Callable[..., Array] | None = None
    encode: Callable[[Array], Array] | None = None
    problem: Callable[..., str | None] | None = None
    others: tuple[TensorInfo, ...] = ()
    computes: bool = False  # unpacking does more than to view the values
    name: str = ""

    @property
    def dtype(self) -> Any:
        if isinstance(self.info, BlockTensor) and self.info.quantized:
            return COMPONENT_DTYPES["BF16"]  # the least that models are computed in
        return COMPONENT_DTYPES[self.info.dtype]

    def look(self, data: Array, layer: Layer | None) -> Array:
        others = [_values(info) for info in self.others]
        if self.problem is not None and (found := self.problem(data, *others)):
            fail(self.info, self.name, found)
        if self.unpack is not None:
            data = self.unpack(data, *others)
        data = data if self.view is None else self.view(data, layer)
        return data if self.encode is None else self.encode(data)


@dataclass(frozen=True)
class LoadPlan:
    """The pieces of every public tensor: one, or one per expert."""

    spec: ModelSpec
    pieces: Mapping[param_layout.Path, Sequence[Piece]]

    @classmethod
    def of(cls, spec: ModelSpec, pieces: Mapping[param_layout.Path, Sequence[Piece]]) -> Self:
        """In the checkpoint's dtype."""
        found = cls(spec, pieces)
        return found.in_dtype(found.stored_dtype())

    def in_dtype(self, dtype: Any) -> Self:
        """The plan of the same model with parameters of this dtype."""
        return replace(self, spec=replace(self.spec, dtype=jnp.dtype(dtype).name))

    def quantized(self, name: online.Online) -> Self:
        """The plan of the same model with weights that are quantized while they are read."""
        spec = online.quantized(self.spec, name)
        pieces: dict[param_layout.Path, Sequence[Piece]] = {}
        shapes = dict(param_layout.leaves(param_layout.abstract_public(spec)))
        for path in shapes:
            component = component_at(spec, path)
            if component is None:
                pieces[path] = self.pieces[path]
                continue
            stored = self.pieces[path[:-1]]
            encode = online.host_encoder(spec, path, shapes, count=len(stored))
            pieces[path] = [replace(piece, encode=encode) for piece in stored]
        return replace(self, spec=spec, pieces=pieces)

    @property
    def bytes(self) -> int:
        """What reading copies from files, or encodes. What is unpacked counts as often as it is needed."""
        pieces = [piece for pieces in self.pieces.values() for piece in pieces if piece.encode is None]
        stored = [*{piece.info for piece in pieces if not piece.computes}]
        stored += [piece.info for piece in pieces if piece.computes]
        leaves = param_layout.leaves(param_layout.abstract_public(self.spec)) if self.spec.quantized else ()
        encoded = (leaf for path, leaf in leaves if self.pieces[path][0].encode is not None)
        return sum(info.stop - info.start for info in stored) + sum(
            math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in encoded
        )

    def size(self, dtype: Any = None) -> int:
        """The approximate size of the parameters in bytes, as `dtype` or as stored."""
        if dtype is None:
            return self.bytes
        plain = {piece.info for path in self.pieces if not self._component(path) for piece in self.pieces[path]}
        rest = {piece.info for pieces in self.pieces.values() for piece in pieces} - plain
        values = sum(math.prod(info.shape) for info in plain)
        return values * jnp.dtype(dtype).itemsize + sum(info.stop - info.start for info in rest)

    def _component(self, path: param_layout.Path) -> Component | None:
        return component_at(self.spec, path)

    def stored_dtype(self) -> Any:
        """The dtype of most bytes, except those of quantized weights. float64 becomes float32, because nothing computes
        in float64."""
        count: Counter[Any] = Counter()
        for path, pieces in self.pieces.items():
            for piece in pieces if self._component(path) is None else ():
                count[piece.dtype] += piece.info.stop - piece.info.start
        return _within_32_bits(max(count, key=lambda dtype: count[dtype]))

    def leaf_dtype(self, path: param_layout.Path) -> Any:
        """A dtype that stores this tensor without loss (except for float64)."""
        if component := self._component(path):
            return jnp.dtype(component.dtype)
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
            if isinstance(piece.info, BlockTensor):
                yield from _decoded(piece, piece.info, layer, place, shape[stack:])
                continue
            yield TensorCopy(piece.info, piece.dtype, partial(look, piece, place), place, piece.computes)


def _values(info: TensorInfo) -> Array:
    return read_bytes(info).view(COMPONENT_DTYPES[info.dtype]).reshape(info.shape)


def whole(info: TensorInfo, into: Array) -> Iterator[TensorCopy]:
    """Copies of a tensor's values as they are."""
    piece = Piece(info)
    if isinstance(info, BlockTensor):
        yield from _decoded(piece, info, None, into, info.shape)
    else:
        yield TensorCopy(info, piece.dtype, lambda data: data, into)


DECODED = 1 << 20  # values that are decoded at a time


def _decoded(
    piece: Piece, info: BlockTensor, layer: Layer | None, place: Array, shape: tuple[int, ...]
) -> Iterator[TensorCopy]:
    """Copies of the values, viewed as `shape` and broadcast, of a tensor that is decoded a few rows at a time."""
    rows = np.arange(info.rows) if piece.view is None else piece.view(np.arange(info.rows), layer).reshape(-1)
    first, count = int(rows[0]), len(rows)
    assert np.array_equal(rows, np.arange(first, first + count))  # views of these tensors select adjacent rows
    parts = shape[0] if piece.encode is None and len(shape) > 1 and place.shape[0] == shape[0] else 1
    each = count // parts  # rows of one index of the first axis; these are whole heads, if there are any
    step = max(1, DECODED // max(1, math.prod(shape) // parts))

    def look(into: Array, raw: Array) -> Array:
        values = info.decoded(raw)
        values = values if piece.encode is None else piece.encode(values)
        return np.broadcast_to(values.reshape(-1, *shape[1:]), into.shape)

    for at in range(0, parts, step):
        into = place[at : at + step] if parts > 1 else place
        taken = each * (min(at + step, parts) - at)
        start = info.start + (first + at * each) * info.row_bytes
        stored = TensorInfo("U8", (taken, info.row_bytes), start, start + taken * info.row_bytes, info.file)
        yield TensorCopy(stored, np.dtype(np.uint8), partial(look, into), into, computes=True)


PREFIX = "model."
CLASSIFIERS = (r"^score\.weight$",)  # heads of classification models, which frontend/pooling_files.py reads


def _within_32_bits(dtype: Any) -> Any:
    return np.dtype(np.float32) if dtype == np.float64 else dtype


def layer_of(spec: ModelSpec, path: param_layout.Path) -> Layer | None:
    return spec.layers[int(path[1])] if path[0] == "layers" else None


def plan(folder: Path, spec: ModelSpec, family: Family) -> LoadPlan:
    """The plan of a Hugging Face folder, by the family's WEIGHTS."""
    file = safetensors.gguf_of(folder)
    tensors = gguf.read(file) if file else read_checkpoint(folder)
    bare = _with_prefix(family.WEIGHTS, tensors)
    if bare is not None:
        tensors = bare
        if not any(rule.path == "head" and rule.source in tensors for rule in family.WEIGHTS) and not spec.tied:
            spec = spec.without_head()
    chosen, spec = registry.quantization(folder, spec, family, _Tensors(tensors))
    if spec.tied and (
        _head_is_quantized(family.WEIGHTS, tensors, spec, chosen) or _heads_differ(family.WEIGHTS, tensors)
    ):
        spec = replace(spec, tied=False)
    for note in chosen.notes if chosen else ():
        logger.warning("%s", note)
    planner = _Planner(spec, family.WEIGHTS, tensors, chosen, shown=_shown(file.resolve() if file else folder))
    pieces = {path: planner.find(path, leaf) for path, leaf in param_layout.leaves(param_layout.abstract_public(spec))}
    planner.check_used((*getattr(family, "IGNORED", ()), *(() if spec.generates else CLASSIFIERS)))
    return LoadPlan.of(spec, pieces)


def _with_prefix(weights: Iterable[Rule], tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo] | None:
    """The tensors under the names that they have in a language model, if the checkpoint is of one saved without its
    head, as embedding models are: its names lack the prefix `model.`"""
    embed = next((rule.source for rule in weights if rule.path == "embed.weight"), "")
    if not embed.startswith(PREFIX) or embed in tensors or embed.removeprefix(PREFIX) not in tensors:
        return None
    heads = {rule.source for rule in weights if not rule.source.startswith(PREFIX)}
    return {
        name if name in heads or any(re.search(each, name) for each in CLASSIFIERS) else PREFIX + name: info
        for name, info in tensors.items()
    }


def _head_is_quantized(
    weights: Iterable[Rule], tensors: Mapping[str, TensorInfo], spec: ModelSpec, chosen: Format | None
) -> bool:
    """Whether the head is stored, and quantized: then it is not the embedding."""
    scheme = spec.scheme_of(("head",))
    modules = [rule.source.removesuffix(".weight") for rule in weights if rule.path == "head"]
    if scheme is None or chosen is None:
        return False
    return any(module + chosen.source(module, scheme.components[0]).suffix in tensors for module in modules)


def _heads_differ(weights: Iterable[Rule], tensors: Mapping[str, TensorInfo]) -> bool:
    """Whether embedding and head are both stored and differ: then they are not tied, regardless of the config."""
    stored = {rule.path: tensors[rule.source] for rule in weights if rule.source in tensors}
    embed, head = stored.get("embed.weight"), stored.get("head")
    if embed is None or head is None or head.shape != embed.shape:
        return False
    return head.dtype != embed.dtype or not equal_bytes(embed, head)


class _Tensors(dict[str, TensorInfo]):
    """As formats of quantized checkpoints want them."""

    def small(self, name: str) -> Array:
        return _values(self[name])

    def where(self, name: str) -> str:
        return f"{_shown(self[name].file)}: tensor {quote(name)}"


class _Planner:
    def __init__(
        self,
        spec: ModelSpec,
        weights: Iterable[Rule],
        tensors: Mapping[str, TensorInfo],
        chosen: Format | None,
        *,
        shown: str,
    ) -> None:
        self._shown, self._spec, self._tensors, self._format = shown, spec, tensors, chosen
        self._used: dict[str, Fraction] = {}  # the share of each tensor that is used
        self._unpacked: dict[Any, tuple[Array, bool]] = {}
        self._rules: dict[str, list[Rule]] = {}
        for rule in weights:
            self._rules.setdefault(rule.path, []).append(rule)
        if spec.tied:  # stored once, under either name
            self._rules["embed.weight"] = self._rules["embed.weight"] + self._rules.get("head", [])

    def find(self, path: param_layout.Path, leaf: jax.ShapeDtypeStruct) -> list[Piece]:
        """The pieces of the public tensor at `path`, by the first rule whose source the checkpoint has."""
        shape, layer, component = leaf.shape, layer_of(self._spec, path), component_at(self._spec, path)
        weight = path if component is None else path[:-1]
        rules = self._rules.get(
            param_layout.dotted(weight if layer is None else ("layers", "{layer}", *weight[2:])), ()
        )
        if not rules:
            raise AssertionError(f"no rule of the family gives {param_layout.dotted(path)}")
        if any("{expert}" in rule.source for rule in rules) and shape[0] > len(self._tensors):
            problem = (
                f"config.json has {shape[0]:,} experts, but the checkpoint has only {len(self._tensors):,} tensors"
            )
            raise CheckpointError(f"{self._shown}: {problem}", _HINT)
        choices = [(rule, list(self._sources(rule, path, shape, component))) for rule in rules]
        rule, found = next((c for c in choices if any(name in self._tensors for name, _ in c[1])), choices[0])
        each = shape[1:] if "{expert}" in rule.source else shape
        view = None if component and not component.rows else rule.view  # views select rows
        pieces: list[Piece] = []
        for name, source in found:
            for needed in (name, *source.also):
                if needed not in self._tensors:
                    problem = f"tensor {quote(needed)} is missing, expected for {param_layout.dotted(path)}"
                    raise CheckpointError(f"{self._shown}: {problem} {list(shape)}", f"download it again, or {_HINT}")
            others = tuple(self._tensors[other] for other in source.also)
            piece = Piece(self._tensors[name], view, source.unpack, problem=source.problem, others=others, name=name)
            share = self._check(piece, each, layer, leaf.dtype if component else None)
            self._used[name] = self._used.get(name, Fraction(0)) + share
            self._used |= dict.fromkeys(source.also, Fraction(1))
            pieces.append(replace(piece, computes=self._unpacked_zeros(piece)[1]))
        return pieces

    def _sources(
        self, rule: Rule, path: param_layout.Path, shape: tuple[int, ...], component: Component | None
    ) -> Iterator[tuple[str, Source]]:
        """The names of the tensors that a rule names, one or one for each expert; and of those that belong to them."""
        for name in _names(rule, path, shape):
            module = name.removesuffix(".weight")
            if component is None or self._format is None:
                yield name, Source(suffix="")
            else:
                source = self._format.source(module, component)
                yield module + source.suffix, replace(source, also=tuple(module + suffix for suffix in source.also))

    def _check(self, piece: Piece, shape: tuple[int, ...], layer: Layer | None, dtype: Any) -> Fraction:
        """Check that the piece can be viewed as `shape`, and as a component of this `dtype`; return the share of its
        tensor that it uses."""
        info, name = piece.info, piece.name
        if not isinstance(info, BlockTensor) and info.dtype not in (DTYPES if dtype is None else COMPONENT_DTYPES):
            kind = "a quantized format" if BITS[info.dtype] <= 8 else "which is not a weight dtype"
            fail(info, name, f"has dtype {info.dtype}, {kind}, expected one of {', '.join(DTYPES)}")
        try:
            whole, _ = self._unpacked_zeros(piece)
            seen = whole if piece.view is None else piece.view(whole, layer)
        except (ValueError, IndexError) as error:
            wanted = f"expected one that can be viewed as {list(shape)} ({error})"
            fail(info, name, f"has shape {list(info.shape)}, {wanted}")
        if not _regroups(seen.shape, shape):
            found = f"has shape {list(info.shape)}"
            if seen.shape != info.shape:
                found += f", of which {list(seen.shape)} is used"
            fail(info, name, f"{found}, expected {list(shape)}, possibly with adjacent axes merged")
        floats = jnp.issubdtype(seen.dtype, jnp.floating)
        plain = floats and dtype in (jnp.float32, jnp.bfloat16, jnp.float16)
        if dtype is not None and seen.dtype != dtype and not plain:
            fail(info, name, f"has dtype {info.dtype}, expected {dtype} for this quantization")
        return Fraction(seen.size, max(whole.size, 1))

    def _unpacked_zeros(self, piece: Piece) -> tuple[Array, bool]:
        """What unpacking makes of zeros, for its shape and dtype, and whether it computes. Most layers have the same
        shapes."""
        shapes = tuple((other.dtype, other.shape) for other in piece.others)
        key = piece.unpack, piece.dtype, piece.info.shape, shapes
        if key not in self._unpacked:
            zeros = [_zeros(piece.info, piece.dtype)]
            zeros += [_zeros(each, COMPONENT_DTYPES[each.dtype]) for each in piece.others]
            whole = zeros[0] if piece.unpack is None else piece.unpack(*zeros)
            computes = not np.may_share_memory(whole, zeros[0])
            self._unpacked[key] = np.broadcast_to(np.zeros((), whole.dtype), whole.shape), computes
        return self._unpacked[key]

    def check_used(self, ignored: Sequence[str]) -> None:
        """Check that every tensor is used, and used completely."""
        for name, share in self._used.items():
            info = self._tensors[name]
            if share < 1:
                count = math.prod(info.shape)
                taken = f"of which the model uses {int(share * count):,} of {count:,} values"
                fail(info, name, f"has shape {list(info.shape)}, {taken}, expected all")
        known = {rule.source for rule in self._rules.get("head", []) if self._spec.tied}  # a copy of the embedding
        ignored = (*ignored, *(self._format.ignored if self._format else ()))
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


def _zeros(info: TensorInfo, dtype: Any) -> Array:
    return np.broadcast_to(np.zeros((), dtype), info.shape)


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
