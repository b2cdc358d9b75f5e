# SPDX-License-Identifier: Apache-2.0
"""What a format of quantized checkpoints says of one: the scheme of each layer, and the tensors that hold its arrays.

A format reads the quantization_config and the headers of the files. Headers decide which layers are quantized, because
lists in configs are often incomplete or name modules as they were called in other versions; a config decides where no
files are at hand yet, for an estimate of sizes.
"""

import fnmatch
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NoReturn, Protocol, cast

import numpy as np

from jaxserve.errors import CheckpointError, one_line
from jaxserve.quant.scheme import Component, Scheme, StorageDtype

type Array = np.ndarray[Any, Any]
type Settings = Mapping[str, Any]

# By the names in headers of safetensors files.
DTYPES: dict[str, StorageDtype] = {
    "I8": "int8",
    "U8": "uint8",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "BF16": "bfloat16",
    "F16": "float16",
    "F32": "float32",
}
_FLOATS = ("bfloat16", "float16", "float32")


class Header(Protocol):
    """A tensor in a file."""

    @property
    def dtype(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...


class Tensors(Protocol):
    """The tensors of a checkpoint by name; none if its files are not at hand."""

    def __contains__(self, name: object, /) -> bool: ...

    def __getitem__(self, name: str, /) -> Header: ...

    def small(self, name: str) -> Array:
        """The values of a small tensor."""
        ...

    def where(self, name: str) -> str:
        """The tensor's file and name, for an error."""
        ...


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where a checkpoint holds a component: the tensor's name is that of the layer with this `suffix`. `unpack` returns
    the values in the order of the plain weight in such checkpoints, usually [rows, columns / n] or [rows]. It must
    accept any values, and gets the tensors with the suffixes `also` as further arguments. `problem` finds a fault of
    the tensor's values, and gets the same arguments."""

    suffix: str
    unpack: Callable[..., Array] | None = None
    also: tuple[str, ...] = ()
    problem: Callable[..., str | None] | None = None


class Format(Protocol):
    """One checkpoint in a format."""

    @property
    def ignored(self) -> Sequence[str]:
        """Patterns of the names of tensors that are not read."""
        ...

    @property
    def notes(self) -> Sequence[str]:
        """What the engine does otherwise than the checkpoint says; a line for the log each."""
        ...

    def scheme(self, layer: str) -> Scheme | None:
        """How the weight of the layer with this name, such as model.layers.0.mlp.up_proj, is stored. None: plainly."""
        ...

    def source(self, layer: str, component: Component) -> Source: ...


type Opener = Callable[[Settings, Tensors], Format]

# Never quantized by the usual tools, whatever a config says; these are the layers' last names.
PLAIN = ("lm_head", "embed_out", "embed_tokens", "embed_in", "wte", "word_embeddings", "gate", "router")
# Scales of a KV cache in 8 bits.
KV_SCALES = r"\.(k|v|q|kv)_(scale|zero_point)$|\.(k_proj|v_proj|k_cache|v_cache)\.output_(scale|zero_point)$"


class Base:
    """What formats share."""

    name: ClassVar[str]
    codes: ClassVar[str]  # the suffix of the tensor that every quantized layer has
    ignored: Sequence[str] = (KV_SCALES,)

    def __init__(self, settings: Settings, tensors: Tensors) -> None:
        self.settings, self.tensors = settings, tensors

    @property
    def notes(self) -> Sequence[str]:
        return ()

    def skipped(self, layer: str) -> bool:
        """Whether the config excludes this layer."""
        names: list[str] = []
        for key in ("modules_to_not_convert", "ignored_layers", "ignore", "exclude_modules"):
            names += strings(self.settings.get(key))
        return layer.rpartition(".")[2] in PLAIN or any(_names(name, layer) for name in names)

    def is_quantized(self, layer: str) -> bool:
        """By its tensors, if it has any, else by the config."""
        if layer + self.codes in self.tensors:
            return self.holds_codes(self.tensors[layer + self.codes])
        return not (layer + ".weight" in self.tensors or layer in self.tensors or self.skipped(layer))

    def holds_codes(self, header: Header) -> bool:
        return True

    def has(self, layer: str, suffix: str, *, by_default: bool = False) -> bool:
        """Whether the layer has this tensor; `by_default` if nothing is known of it."""
        return layer + suffix in self.tensors if layer + self.codes in self.tensors else by_default

    def shape(self, layer: str, suffix: str) -> tuple[int, ...] | None:
        name = layer + suffix
        return self.tensors[name].shape if name in self.tensors else None

    def floats(self, layer: str, suffix: str, default: StorageDtype) -> StorageDtype:
        """The dtype of this tensor if it is one of plain floats."""
        name = layer + suffix
        found = DTYPES.get(self.tensors[name].dtype, default) if name in self.tensors else default
        return found if found in _FLOATS else default

    def group(self, size: object) -> int | None:
        """A group size of the config; None for whole rows."""
        if size is None or size == -1:
            return None
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            self.refuse(f"group_size {one_line(repr(size))}", "expected -1 or a positive number")
        return size

    def pair(self, what: str, value: object) -> tuple[int, int]:
        """The sizes of blocks."""
        match value:
            case [int(height), int(width)] if height > 0 and width > 0:
                return height, width
            case _:
                self.refuse(f"{what} {one_line(repr(value))}", "expected two sizes, such as [128, 128]")

    def check_group(self, layer: str, columns: int, group: int | None) -> None:
        if group is not None and columns % group:
            problem = f"has {columns} columns, expected a multiple of the group size {group}"
            self.fail(layer + self.codes, problem)

    def check_shape(self, name: str, wanted: tuple[int, ...]) -> None:
        if name in self.tensors and self.tensors[name].shape != wanted:
            self.fail(name, f"has shape {list(self.tensors[name].shape)}, expected {list(wanted)}")

    def fail(self, name: str, problem: str) -> NoReturn:
        raise CheckpointError(f"{self.tensors.where(name)} {problem}", f"check that {self.name} describes this file")

    def refuse(self, what: str, hint: str) -> NoReturn:
        raise CheckpointError(f"the checkpoint is quantized by {self.name} with {what}, which is not supported", hint)


def strings(value: object) -> list[str]:
    """The texts in a list of a config."""
    items = cast(Iterable[object], value) if isinstance(value, list | tuple) else ()
    return [item for item in items if isinstance(item, str)]


def _names(name: str, layer: str) -> bool:
    """Whether an entry of a list names the layer: a regular expression, a pattern, or some parts of its name."""
    if name.startswith("re:"):
        return matches(name.removeprefix("re:"), layer)
    if any(each in name for each in "*?["):
        return fnmatch.fnmatchcase(layer, name)
    return f".{name.strip('.')}." in f".{layer}."


def matches(pattern: str, layer: str) -> bool:
    try:
        return re.match(pattern, layer) is not None
    except re.error:
        problem = f"the quantization_config has the invalid regular expression {one_line(repr(pattern))}"
        raise CheckpointError(problem, "check config.json") from None


# --- values -----------------------------------------------------------------------------------------------------------


def not_scales(values: Array) -> str | None:
    """The fault of scales. Negative ones exist, and zeros too, of rows that are zero; but not zeros alone."""
    wide = values.astype(np.float32)
    if not np.isfinite(wide).all():
        return "has values that are not finite, expected scales"
    return "is zero, expected scales" if values.size and not wide.any() else None


def out_of_range(stop: int) -> Callable[[Array], str | None]:
    """The fault of indices of groups, of which there are `stop`."""

    def problem(values: Array) -> str | None:
        bad = values[(values < 0) | (values >= stop)]
        return f"has the group {bad.flat[0]}, expected 0 to {stop - 1}" if bad.size else None

    return problem
