# SPDX-License-Identifier: Apache-2.0
"""AWQ: columns with large inputs are scaled up before rounding, and what makes the inputs is scaled down.

The scales of a layer's input are mean(|x|)^a / mean(|w|)^(1-a), or mean(|x|)^a, for the a of a grid with the least
squared error of the products. They are folded into the norm before q, k and v, or gate and up (and routers, which stay
plain); into the rows of v, for attention's output projection; and into the rows of up, for down. Then each group's
range is narrowed as far as that lowers the error. https://arxiv.org/abs/2306.00978
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from convert.files.reader import Array
from convert.quantize.compressed import Rounded
from convert.quantize.layers import LayerWeights
from jaxserve.models.param_layout import Path
from jaxserve.models.spec import Attention, ClampedSwiglu, Norm
from jaxserve.quant import rounding
from jaxserve.quant.scheme import Scheme
from jaxserve.quant.schemes import SCALES, ZEROS

_STEPS = 20  # of the grid
_SHARES = tuple(1 - 0.05 * i for i in range(11))  # of a group's range

type Inputs = dict[str, Mapping[str, Array]]  # by tensor, the statistics of what it is multiplied by


@dataclass(frozen=True)
class Fold:
    """A place where scales can be folded: `readers` have their columns multiplied, and `apply` divides what makes their
    input; it returns the scales that it could apply. `same`: channels with one scale for several columns."""

    readers: list[str]
    plain: list[str]  # readers that are not rounded
    apply: Callable[[Array], Array]
    spread: Callable[[Array], Array] = lambda scales: scales  # from channels to columns
    gather: Callable[[Array], Array] = lambda columns: columns  # the mean of the columns of a channel


def scale(weights: LayerWeights, inputs: Inputs, chosen: Mapping[str, Rounded], stored: Callable[[str], Any]) -> None:
    """Scale a layer's weights and the statistics of their inputs in place. `stored`: the dtype that a plain tensor is
    written in."""
    for fold in _folds(weights, chosen, stored):
        scales = _search(fold, weights, inputs, chosen)
        if scales is not None:
            columns = fold.spread(fold.apply(scales))
            for name in fold.readers:
                weights.arrays[name] *= columns
                inputs[name] = {**inputs[name], "gram": inputs[name]["gram"] / (columns[:, None] * columns)}
            for name in fold.plain:
                weights.arrays[name] = _as_stored(weights.arrays[name] * columns, stored(name))


def components(weight: Array, gram: Any, scheme: Scheme) -> dict[str, Array]:
    """The components of a float32 matrix by the best range of each group."""
    return {name: np.asarray(array) for name, array in _narrowed(weight, gram, scheme=scheme).items()}


# --- where scales can be folded ---------------------------------------------------------------------------------------


def _folds(weights: LayerWeights, chosen: Mapping[str, Rounded], stored: Callable[[str], Any]) -> Iterator[Fold]:
    layer = weights.layer

    def readers(*paths: Path) -> tuple[list[str], list[str]]:
        names = [name for path in paths for name in weights.names.get(path, ())]
        return [each for each in dict.fromkeys(names) if each in chosen], [
            each for each in dict.fromkeys(names) if each not in chosen
        ]

    attention = [weights.path("attention", name, "kernel") for name in ("q", "k", "v", "q_down", "kv_down")]
    if weights.path("attention", "q_down", "kernel") in weights.names:
        attention = attention[-2:]  # q reads what q_down makes
    mlp = [path for path in weights.names if path[2] == "mlp" and path[-1] == "kernel" and path[-2] != "down"]
    shared = layer.parallel and layer.mlp_in is None
    for name, norm, paths in (
        ("attention_in", layer.attention_in, (*attention, *(mlp if shared else ()))),
        ("mlp_in", layer.mlp_in, tuple(mlp)),
    ):
        if norm is not None and norm.weight:
            yield Fold(*readers(*paths), apply=partial(_into_norm, weights, name, norm, stored))
    if isinstance(layer.attention, Attention):
        yield _of_values(weights, layer.attention, *readers(weights.path("attention", "out", "kernel")), stored)
    for path in mlp:
        gated = path[-2] == "up" and weights.path(*map(str, path[2:-2]), "gate", "kernel") in weights.names
        if gated and not isinstance(layer.mlp.activation, ClampedSwiglu):
            for i, name in enumerate(weights.names[weights.path(*map(str, path[2:-2]), "down", "kernel")]):
                yield Fold([name], [], apply=partial(_into_rows, weights, path, i, stored))


def _into_norm(weights: LayerWeights, name: str, norm: Norm, stored: Callable[[str], Any], scales: Array) -> Array:
    [weight] = weights.names[weights.path(name, "weight")]
    before = weights.arrays[weight] + np.float32(norm.offset)
    weights.arrays[weight] = _as_stored(before / scales - np.float32(norm.offset), stored(weight))
    after = weights.arrays[weight] + np.float32(norm.offset)
    # What rounding of the norm changed is part of the scales.
    scales = np.where((after != 0) & (before != 0), before / np.where(after != 0, after, 1), scales)
    for bias in weights.names.get(weights.path(name, "bias"), ()):
        weights.arrays[bias] = _as_stored(weights.arrays[bias] / scales, stored(bias))
    return scales.astype(np.float32)


def _into_rows(weights: LayerWeights, path: Path, part: int, stored: Callable[[str], Any], scales: Array) -> Array:
    rows = weights.views(path)[part]
    rows.reshape(len(scales), -1)[...] /= scales[:, None]
    bias = (*path[:-1], "bias")
    if bias in weights.names:
        weights.views(bias)[part].reshape(-1)[...] /= scales
    return scales


def _of_values(
    weights: LayerWeights, attention: Attention, readers: list[str], plain: list[str], stored: Callable[[str], Any]
) -> Fold:
    """A KV head's values are read by the columns of all query heads in its group."""
    heads, group, size = attention.kv_heads, attention.group, attention.head_dim

    def spread(scales: Array) -> Array:
        return np.repeat(scales.reshape(heads, 1, size), group, axis=1).reshape(-1)

    def gather(columns: Array) -> Array:
        return columns.reshape(heads, group, size).mean(1).reshape(-1)

    apply = partial(_into_rows, weights, weights.path("attention", "v", "kernel"), 0, stored)
    return Fold(readers, plain, apply, spread, gather)


def _as_stored(values: Array, dtype: Any) -> Array:
    return values.astype(dtype).astype(np.float32)


# --- the search -------------------------------------------------------------------------------------------------------


def _search(fold: Fold, weights: LayerWeights, inputs: Inputs, chosen: Mapping[str, Rounded]) -> Array | None:
    """The scales of a place, by channel; None if none are better than no scales."""
    readers = [name for name in fold.readers if chosen[name].rounding == "groups"]
    count = sum(float(inputs[name]["count"]) for name in readers)
    if not readers or count == 0:
        return None
    size = fold.gather(np.sum([inputs[name]["size"] for name in readers], axis=0) / np.float32(count))
    steep = fold.gather(_relative([(weights.arrays[name], chosen[name].scheme) for name in readers]))
    best, least = None, _loss(fold, readers, weights, inputs, chosen, np.ones_like(size))
    for step in range(1, _STEPS + 1):
        power = step / _STEPS
        for scales in (size**power, size**power / (steep ** (1 - power) + 1e-4)):
            tried = np.maximum(scales, 1e-4).astype(np.float32)
            tried /= np.sqrt(tried.max() * tried.min())
            loss = _loss(fold, readers, weights, inputs, chosen, tried)
            if np.isfinite(tried).all() and loss < least:
                best, least = tried, loss
    return best


def _relative(matrices: list[tuple[Array, Scheme]]) -> Array:
    """By column, the mean magnitude as a share of its group's largest."""
    means: list[Array] = []
    for matrix, scheme in matrices:
        parts = np.abs(matrix).reshape(len(matrix), -1, scheme.components[1].columns or 1)
        most = parts.max(-1, keepdims=True)
        means.append((parts / np.where(most > 0, most, 1)).reshape(matrix.shape).mean(0))
    return np.mean(means, axis=0)


def _loss(
    fold: Fold,
    readers: list[str],
    weights: LayerWeights,
    inputs: Inputs,
    chosen: Mapping[str, Rounded],
    scales: Array,
) -> float:
    columns = fold.spread(scales)
    each = (_error(weights.arrays[name], inputs[name]["gram"], columns, scheme=chosen[name].scheme) for name in readers)
    return float(sum(map(float, each)))


@partial(jax.jit, static_argnames="scheme")
def _error(weight: jax.Array, gram: jax.Array, scales: jax.Array, *, scheme: Scheme) -> jax.Array:
    """The squared error of all products with a matrix that is rounded with these scales of its columns."""
    scales = scales[None]
    lost = _dense(weight * scales, {}, scheme) / scales - weight
    return jnp.sum(jnp.matmul(lost, gram) * lost)


def _dense(weight: jax.Array, shared: Mapping[str, jax.Array], scheme: Scheme) -> jax.Array:
    """A matrix after rounding, by given scales and zero points, or those of the ranges."""
    group = scheme.components[1].columns
    shared = shared or rounding.of_ranges(scheme, weight, jnp)
    step = shared[SCALES].astype(jnp.float32)[..., None]
    middle = shared[ZEROS].astype(jnp.float32)[..., None]
    parts = weight.reshape(len(weight), -1, group)
    codes = jnp.clip(jnp.rint(parts / jnp.where(step > 0, step, 1)) + middle, 0, 15)
    return ((codes - middle) * step).reshape(weight.shape)


@partial(jax.jit, static_argnames="scheme")
def _narrowed(weight: jax.Array, gram: jax.Array, *, scheme: Scheme) -> dict[str, jax.Array]:
    group = scheme.components[1].columns
    assert group is not None
    rows, columns = weight.shape
    # Of each group, the sum of products of its columns alone.
    blocks = gram.reshape(columns // group, group, columns // group, group)
    blocks = jnp.moveaxis(jnp.diagonal(blocks, axis1=0, axis2=2), -1, 0)

    best: dict[str, jax.Array] = rounding.of_ranges(scheme, weight, jnp)
    least = jnp.full((rows, columns // group), jnp.inf, jnp.float32)
    for share in _SHARES:
        shared = rounding.of_ranges(scheme, weight, jnp, share=share)
        lost = (_dense(weight, shared, scheme) - weight).reshape(rows, -1, group)
        loss = jnp.sum(jnp.einsum("rgi,gij->rgj", lost, blocks) * lost, axis=-1)
        best = {name: jnp.where(loss < least, shared[name], best[name]) for name in best}
        least = jnp.minimum(least, loss)
    return best | {"codes": rounding.codes_by(scheme, weight, best, jnp)}
