# SPDX-License-Identifier: Apache-2.0
"""Quantizes a model's weights while they are loaded, from a checkpoint that stores them plainly."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, Literal, get_args

import jax

from jaxserve.errors import JaxserveError
from jaxserve.models import param_layout
from jaxserve.models.decoder import declare
from jaxserve.models.mesh_fit import Fit
from jaxserve.models.param_layout import Path
from jaxserve.models.spec import ModelSpec
from jaxserve.models.weight import public_paths
from jaxserve.quant import int8
from jaxserve.quant.formats import FORMATS
from jaxserve.quant.int8 import CODES
from jaxserve.quant.scheme import Component, Quantized, Scheme

type Online = Literal["int8"]

__all__ = ["CODES", "Online", "encoded", "host_encoder", "quantized", "to_apply"]

logger = logging.getLogger(__name__)
ONLINE: tuple[Online, ...] = get_args(Online.__value__)
# vLLM's names of kernels and variants, and the method of the checkpoints that they are for.
SAME = {
    "awq_marlin": "awq",
    "gptq_marlin": "gptq",
    "gpt_oss_mxfp4": "mxfp4",
    "modelopt_fp4": "modelopt",
}

SCHEMES = (int8.FUSED, int8.ALONE)
# Small weights that decide much: routers choose experts; MLA multiplies k_up and v_up head by head, not as one matrix.
PLAIN = ("router", "k_up", "v_up", "shared_gate")


def to_apply(name: str, spec: ModelSpec, stored: str | None) -> Online | None:
    """The method to quantize a plain checkpoint with; None if it is quantized by the named one. `stored`: the method of
    the checkpoint, if that is known."""
    wanted = SAME.get(name, name)
    if not spec.quantized:
        for each in ONLINE:
            if each == wanted:
                return each
        problem = f"quantization is {name!r}, but the checkpoint is not quantized"
        raise JaxserveError(problem, f"leave it out, or choose {' or '.join(ONLINE)} to quantize it now")
    if wanted in ONLINE and wanted not in FORMATS:
        raise JaxserveError("the checkpoint is already quantized", f"leave out quantization={name!r}")
    if stored not in (None, wanted):
        problem = f"quantization is {name!r}, but the checkpoint is quantized by {stored}"
        raise JaxserveError(problem, "leave it out: the checkpoint's config has the method")
    if wanted != name:
        logger.info("quantization %s is read as %s: there is no choice of kernels", name, wanted)
    return None


def quantized(spec: ModelSpec, name: Online) -> ModelSpec:
    """The spec of the same model with its weights in this scheme."""
    if spec.quantized:
        raise JaxserveError("the checkpoint is already quantized", f"leave out quantization={name!r}")
    found: dict[str, Scheme] = {}
    for path, variable in param_layout.leaves(declare(spec, Fit())):
        if "ins" in variable.get_metadata() and not set(PLAIN) & set(path):
            publics = public_paths(path)
            scheme = int8.ALONE if publics == [path] and path[-1] == "kernel" else int8.FUSED
            found |= {_general(public): scheme for public in publics}
    return replace(spec, quantized=tuple(Quantized(path=path, scheme=scheme) for path, scheme in found.items()))


def _general(path: Path) -> str:
    """The path with a placeholder for the layer's number."""
    return ".".join(map(str, (path[0], "{layer}", *path[2:]) if path[0] == "layers" else path))


def encoded(spec: ModelSpec, given: Mapping[Path, Any]) -> dict[Path, Any]:
    """Arrays by their public paths, in which plain weights become the components that the spec has in their place."""
    schemes = {path: scheme for path in given if (scheme := spec.scheme_of(path)) in SCHEMES}
    if not schemes:
        return dict(given)
    wanted = dict(param_layout.leaves(param_layout.abstract_public(spec)))
    found: dict[Path, Any] = {}
    for path, array in given.items():
        if path not in schemes:
            found[path] = array
            continue
        columns = wanted[*path, CODES].shape[-1]
        if array.size % columns:  # the check of shapes will report it
            found[path] = array
            continue
        leaf = wanted[*path, CODES]
        experts = leaf.shape[0] if "experts" in path else 1
        parts = _encode(schemes[path], array.reshape(experts, -1, columns))
        found |= {(*path, name): part.reshape(wanted[*path, name].shape) for name, part in parts.items()}
    return found


@partial(jax.jit, static_argnums=0)
def _encode(scheme: Scheme, stack: jax.Array) -> dict[str, jax.Array]:
    return jax.vmap(partial(int8.encode, scheme))(stack)


def host_encoder(scheme: Scheme, component: Component, columns: int) -> Callable[[Any], Any]:
    """A function from a plain weight with so many columns to this component of it, both numpy arrays."""
    return partial(int8.encode_on_host, scheme, component.name, columns)
