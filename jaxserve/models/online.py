# SPDX-License-Identifier: Apache-2.0
"""Quantizes a model's weights while they are loaded, from a checkpoint that stores them plainly.

                                 layers                                        embeddings and head
    int8                         int8 by row, products of integers             the same
    int8_per_channel_weight_only int8 by row, decoded for each product         the same
    int4                         4 bits with zero points, in groups of columns as int8
    fp8                          float8 by matrix                              plain
    fp8_per_channel              float8 by row                                 plain
    fp8_per_block                float8 by blocks of 128 x 128                 plain

Groups have 128 columns, or 64 or 32 where 128 do not divide them. The columns of attention's output projection are
those of heads; a group is in one head where it can be, so that heads divide among devices. A weight whose columns do
not divide into groups is rounded to int8 by row instead of 4 bits, or to float8 by row instead of blocks.
"""

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, Literal, cast, get_args

import jax
import numpy as np

from jaxserve.errors import JaxserveError
from jaxserve.models import param_layout
from jaxserve.models.decoder import declare
from jaxserve.models.mesh_fit import Fit
from jaxserve.models.param_layout import Path
from jaxserve.models.spec import ModelSpec
from jaxserve.models.weight import public_paths
from jaxserve.quant import int8, rounding, schemes
from jaxserve.quant.formats import FORMATS
from jaxserve.quant.scheme import Quantized, Rounding, Scheme

type Online = Literal["int8", "int8_per_channel_weight_only", "int4", "fp8", "fp8_per_channel", "fp8_per_block"]
type Rounded = tuple[Scheme, Rounding]

logger = logging.getLogger(__name__)
ONLINE: tuple[Online, ...] = get_args(Online.__value__)
# vLLM's names of kernels and variants, and the method of the checkpoints that they are for.
SAME = {
    "awq_marlin": "awq",
    "gptq_marlin": "gptq",
    "gpt_oss_mxfp4": "mxfp4",
    "modelopt_fp4": "modelopt",
}

# Small weights that decide much: routers choose experts; MLA multiplies k_up and v_up head by head, not as one matrix.
PLAIN = ("router", "k_up", "v_up", "shared_gate")
SMALLEST_GROUP, LARGEST_GROUP = 32, 128
INT8_ROWS: Rounded = schemes.in_groups(bits=8, group=None, scales="float32", signed=True), "rows"
FLOAT8_ROWS: Rounded = schemes.float8(group=None), "float8_rows"
FLOAT8_MATRIX: Rounded = schemes.float8(group=None), "float8_tensor"


def to_apply(name: str, spec: ModelSpec, stored: str | None) -> Online | None:
    """The method to quantize a plain checkpoint with; None if it is quantized by the named one. `stored`: the method of
    the checkpoint, if that is known."""
    wanted = SAME.get(name, name)
    if not spec.quantized:
        for each in ONLINE:
            if each == wanted:
                return each
        problem = f"quantization is {name!r}, but the checkpoint is not quantized"
        raise JaxserveError(problem, f"leave it out, or choose {', '.join(ONLINE)} to quantize it now")
    if wanted in ONLINE and wanted not in FORMATS:
        raise JaxserveError("the checkpoint is already quantized", f"leave out quantization={name!r}")
    if stored not in (None, wanted):
        problem = f"quantization is {name!r}, but the checkpoint is quantized by {stored}"
        raise JaxserveError(problem, "leave it out: the checkpoint's config has the method")
    if wanted != name:
        logger.info("quantization %s is read as %s: there is no choice of kernels", name, wanted)
    return None


def quantized(spec: ModelSpec, name: Online) -> ModelSpec:
    """The spec of the same model with its weights rounded by this method."""
    if spec.quantized:
        raise JaxserveError("the checkpoint is already quantized", f"leave out quantization={name!r}")
    shapes = dict(param_layout.leaves(param_layout.abstract_public(spec)))
    found: dict[str, dict[Path, Rounded]] = {}
    for path, variable in param_layout.leaves(declare(spec, Fit())):
        count = variable.get_metadata().get("ins")
        if count is None or set(PLAIN) & set(path):
            continue
        publics = public_paths(path)
        for public in publics:
            chosen = _rounded(name, public, shapes[public].shape[-count:], alone=publics == [path])
            if chosen is not None:
                found.setdefault(_general(public), {})[public] = chosen
    return replace(spec, quantized=tuple(each for general, those in found.items() for each in _entries(general, those)))


def _entries(general: str, those: Mapping[Path, Rounded]) -> list[Quantized]:
    """One for all layers if they are alike, else one for each."""
    alike = len({*those.values()}) == 1
    paths = [general] if alike else map(param_layout.dotted, those)
    return [
        Quantized(path=path, scheme=each[0], rounding=each[1])
        for path, each in zip(paths, those.values(), strict=False)
    ]


def _rounded(name: Online, path: Path, ins: tuple[int, ...], *, alone: bool) -> Rounded | None:
    """How a method rounds the weight at a public path, which multiplies axes of these sizes. `alone`: the engine does
    not fuse it with others. None: not at all."""
    table = path[-1] != "kernel"  # an embedding, or the head
    match name:
        case "int8":
            return int8.ALONE if alone and not table else int8.FUSED, "int8"
        case "int8_per_channel_weight_only":
            return INT8_ROWS
        case "int4":
            return (int8.FUSED, "int8") if table else in_groups(ins)
        case "fp8":
            return None if table else FLOAT8_MATRIX
        case "fp8_per_channel":
            return None if table else FLOAT8_ROWS
        case "fp8_per_block":
            return None if table else _in_blocks(ins)


def in_groups(ins: tuple[int, ...]) -> Rounded:
    group = group_of(ins)
    if group is None:
        return INT8_ROWS
    return schemes.in_groups(bits=4, group=group, scales="bfloat16", zeros="uint8"), "groups"


def _in_blocks(ins: tuple[int, ...]) -> Rounded:
    group = group_of(ins)
    return FLOAT8_ROWS if group is None else (schemes.float8(group=group), "float8_blocks")


def group_of(ins: tuple[int, ...]) -> int | None:
    """The columns of a group in a matrix of as many columns as these axes have; None if none divides them."""
    size = math.gcd(ins[-1], LARGEST_GROUP)
    if size < SMALLEST_GROUP and len(ins) > 1:  # of several heads, but few: they may be on different devices
        size = math.gcd(math.prod(ins), SMALLEST_GROUP)
    return size if size >= SMALLEST_GROUP else None


def _general(path: Path) -> str:
    """The path with a placeholder for the layer's number."""
    return ".".join(map(str, (path[0], "{layer}", *path[2:]) if path[0] == "layers" else path))


# --- values -----------------------------------------------------------------------------------------------------------


def encoded(spec: ModelSpec, given: Mapping[Path, Any]) -> dict[Path, Any]:
    """Arrays by their public paths, in which plain weights become the components that the spec has in their place."""
    rounded = {path: how for path in given if (how := _rounding(spec, path)) is not None}
    if not rounded:
        return dict(given)
    wanted = dict(param_layout.leaves(param_layout.abstract_public(spec)))
    found: dict[Path, Any] = {}
    for path, array in given.items():
        if path not in rounded:
            found[path] = array
            continue
        scheme = cast(Scheme, spec.scheme_of(path))
        codes = scheme.components[0]
        leaf = wanted[*path, codes.name]
        columns = leaf.shape[-1] * (codes.columns or 1)
        if array.size != math.prod(leaf.shape[:-1]) * columns:
            problem = f"{param_layout.dotted(path)} has shape {list(array.shape)}"
            problem += f", expected as many values as in {[*leaf.shape[:-1], columns]}"
            raise JaxserveError(problem, "pass parameters of this model")
        experts = leaf.shape[0] if "experts" in path else 1
        parts = _encode(rounded[path], scheme, array.reshape(experts, -1, columns))
        found |= {(*path, name): part.reshape(wanted[*path, name].shape) for name, part in parts.items()}
    return found


def _rounding(spec: ModelSpec, path: Path) -> Rounding | None:
    """How a plain weight for this path is rounded; also if the checkpoint had it in int8 by row."""
    return spec.rounding_of(path) or ("int8" if spec.scheme_of(path) in (int8.FUSED, int8.ALONE) else None)


@partial(jax.jit, static_argnums=(0, 1))
def _encode(how: Rounding, scheme: Scheme, stack: jax.Array) -> dict[str, jax.Array]:
    return jax.vmap(partial(rounding.encode, how, scheme))(stack)


def host_encoder(spec: ModelSpec, path: Path, shapes: Mapping[Path, Any], *, count: int) -> Callable[[Any], Any]:
    """A function from a plain weight to the component at this public path, both numpy arrays; for a weight that comes
    in `count` parts. `shapes` are those of the public tree."""
    weight, name = path[:-1], str(path[-1])
    how, scheme = spec.rounding_of(weight), spec.scheme_of(weight)
    assert how is not None and scheme is not None
    codes = scheme.components[0]
    shape = shapes[*weight, codes.name].shape
    columns = shape[-1] * (codes.columns or 1)
    matrices = shape[0] // count if "experts" in weight else 1

    def encode(part: Any) -> Any:
        stack = part.reshape(matrices, -1, columns)
        return np.stack([rounding.encode_on_host(how, scheme, name, each) for each in stack])

    return encode
