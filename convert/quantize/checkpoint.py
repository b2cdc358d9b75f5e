# SPDX-License-Identifier: Apache-2.0
"""A model as a quantized checkpoint of compressed-tensors: which tensors are rounded and how, and its files.

Tensors are read, rounded and written one at a time, under the names of the source. Matrices of layers are rounded;
embeddings, the head, norms, biases, routers and MLA's up-projections of keys and values are copied.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, Protocol, cast

import jax.numpy as jnp
import numpy as np

from convert import orbax
from convert.files import safetensors, shards
from convert.files.header import TensorInfo, quote
from convert.files.reader import Array, Reader, aligned
from convert.files.shards import Entry, Planned
from convert.gguf import names as gguf
from convert.plan import COMPONENT_DTYPES, DTYPES, LoadPlan, Piece, layer_of, whole
from convert.quantize import compressed
from convert.quantize.compressed import Rounded
from jaxserve.errors import CheckpointError
from jaxserve.models import hf, online, registry
from jaxserve.models.online import Online
from jaxserve.models.spec import Layer
from jaxserve.quant import rounding

_CODES = {np.dtype(dtype): code for code, dtype in reversed(COMPONENT_DTYPES.items())}


type Method = Online | Literal["awq", "gptq"]


class Rounder(Protocol):
    """Makes what is written of the matrices that are rounded."""

    def components(self, name: str) -> Mapping[str, Array]: ...

    def plain(self, name: str) -> Array | None:
        """Other values of a tensor that is not rounded, in float32; None: as they are."""
        ...


@dataclass(frozen=True)
class PlainModel:
    """A plain model whose tensors have names."""

    folder: Path
    plan: LoadPlan
    tensors: Mapping[str, TensorInfo]
    chosen: Mapping[str, Rounded]
    dtype: str | None

    @classmethod
    def open(cls, folder: Path, plan: LoadPlan, method: Method, *, dtype: str | None = None) -> "PlainModel":
        """`dtype`: of what is not rounded; None: as stored."""
        if orbax.is_converted(folder):
            problem = f"{folder} is a converted model, which has no tensors with Hugging Face's names"
            raise CheckpointError(problem, "name the model that it was converted from")
        if plan.spec.quantized:
            raise CheckpointError("the checkpoint is already quantized", "name the plain one, or leave out --quantize")
        file = safetensors.gguf_of(folder)
        tensors = gguf.read(file) if file else safetensors.read_checkpoint(folder)
        return cls(folder, plan, tensors, _chosen(plan, tensors, method), dtype)

    @property
    def bytes(self) -> int:
        return sum(info.stop - info.start for info in self.tensors.values())

    @cached_property
    def _numbers(self) -> dict[TensorInfo, int]:
        pieces = ((path, piece) for path, those in self.plan.pieces.items() for piece in those)
        return {piece.info: int(path[1]) for path, piece in pieces if path[0] == "layers"}

    def layer_of(self, name: str) -> int | None:
        """The number of the layer that a tensor belongs to."""
        return self._numbers.get(self.tensors[name])

    def stored(self, name: str) -> Any:
        """The dtype in which a tensor that is not rounded is written."""
        stored = Piece(self.tensors[name]).dtype
        return jnp.dtype(self.dtype) if self.dtype is not None and stored in DTYPES.values() else stored

    def read(self, reader: Reader, name: str, dtype: Any = None) -> Array:
        info = self.tensors[name]
        host = aligned(info.shape, dtype or Piece(info).dtype)
        reader.fill(whole(info, host))
        return host


def _chosen(plan: LoadPlan, tensors: Mapping[str, TensorInfo], method: Method) -> dict[str, Rounded]:
    names = {info: name for name, info in tensors.items()}
    like: dict[Method, Online] = {"int8": "int8_per_channel_weight_only", "awq": "int4", "gptq": "int4"}
    spec = online.quantized(plan.spec, like.get(method) or cast(Online, method))
    found: dict[str, Rounded] = {}
    for path, pieces in plan.pieces.items():
        scheme, how = spec.scheme_of(path), spec.rounding_of(path)
        if scheme is None or how is None or path[-1] != "kernel":
            continue
        activations = method == "int8" or method.startswith("fp8")
        for piece in pieces:
            name = names[piece.info]
            _check_matrix(name, piece, plan, path)
            found[name] = Rounded(scheme, how, activations)
    return {name: found[name] for name in tensors if name in found}


def _check_matrix(name: str, piece: Piece, plan: LoadPlan, path: Any) -> None:
    """Check that the tensor is one matrix [rows, columns], of which a view selects rows."""
    if not (name.endswith(".weight") and _selects_rows(piece, layer_of(plan.spec, path))):
        problem = f"tensor {quote(name)} of shape {list(piece.info.shape)} is not one matrix with an output in each row"
        hint = "quantize this model while loading it, with --quantization"
        raise CheckpointError(f"{problem}, which compressed-tensors cannot describe", hint)


def _selects_rows(piece: Piece, layer: Layer | None) -> bool:
    if len(piece.info.shape) != 2:
        return False
    columns = np.arange(piece.info.shape[1])
    numbered = np.broadcast_to(columns, piece.info.shape)
    try:
        seen = numbered if piece.view is None else piece.view(numbered, layer)
        return bool((seen.reshape(-1, len(columns)) == columns).all())
    except ValueError:  # it has other axes than those
        return False


class Nearest:
    """Rounds each value to the nearest one."""

    def __init__(self, source: PlainModel, reader: Reader) -> None:
        self._source, self._reader = source, reader

    def components(self, name: str) -> Mapping[str, Array]:
        how, matrix = self._source.chosen[name], self._source.read(self._reader, name)
        parts = (each.name for each in how.scheme.components)
        return {part: rounding.encode_on_host(how.rounding, how.scheme, part, matrix) for part in parts}

    def plain(self, name: str) -> Array | None:
        return None


# --- writing ----------------------------------------------------------------------------------------------------------


def write(source: PlainModel, made: Path, *, rounder: Rounder, reader: Reader, done: Callable[[int], object]) -> None:
    """The weights and config.json, into an empty folder."""
    shards.write(made, list(_entries(source, rounder, reader, done)))
    raw = hf.read_json(source.folder / "config.json")
    raw["quantization_config"] = compressed.config(source.chosen, _ignored(source))
    name = source.dtype or jnp.dtype(source.plan.stored_dtype()).name
    raw |= {"torch_dtype": name, **({"dtype": name} if "dtype" in raw else {})}
    (made / "config.json").write_text(json.dumps(raw, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _ignored(source: PlainModel) -> set[str]:
    """The modules that stay plain, and the head, which has no tensor if it is the embedding."""
    stored = {
        name.removesuffix(".weight")
        for name, info in source.tensors.items()
        if name.endswith(".weight") and len(info.shape) == 2 and name not in source.chosen
    }
    family = registry.read_config(source.folder)[1]
    return stored | {rule.source.removesuffix(".weight") for rule in family.WEIGHTS if rule.path == "head"}


def size(source: PlainModel) -> int:
    """The bytes of the weights that `write` writes."""
    nothing: Any = None
    return sum(entry.size for entry in _entries(source, nothing, nothing, nothing))


def _entries(source: PlainModel, rounder: Rounder, reader: Reader, done: Callable[[int], object]) -> Iterator[Entry]:
    """In the order of layers."""

    def counted(name: str, make: Callable[[str], Mapping[str, Array]]) -> Mapping[str, Array]:
        made, info = make(name), source.tensors[name]
        done(info.stop - info.start)
        return made

    def rounded(name: str) -> Mapping[str, Array]:
        return compressed.tensors(name, rounder.components(name), source.chosen[name])

    def copied(name: str) -> Mapping[str, Array]:
        changed, wanted = rounder.plain(name), source.stored(name)
        return {name: source.read(reader, name, wanted) if changed is None else changed.astype(wanted)}

    for name in sorted(source.tensors, key=lambda name: source.layer_of(name) or 0):
        info = source.tensors[name]
        if name in source.chosen:
            yield Entry(compressed.planned(name, info.shape, source.chosen[name]), partial(counted, name, rounded))
        else:
            plan = Planned(name, _CODES[np.dtype(source.stored(name))], info.shape)
            yield Entry([plan], partial(counted, name, copied))
