# SPDX-License-Identifier: Apache-2.0
"""Mixture of experts: exact top-k routing, no dropped tokens, no data-dependent shapes.

The rows of all tokens, one per chosen expert, are sorted by expert; a grouped matmul then reads each expert's weights
once. On a mesh every device runs its own experts on all tokens, and an all-reduce sums the results.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from jaxserve.models.layers import Linear, gate, lift
from jaxserve.models.linear import as_argument, matmul, matmul_grouped
from jaxserve.models.mesh_fit import Fit
from jaxserve.models.mlp import FeedForward
from jaxserve.models.spec import Moe, Router
from jaxserve.models.weight import param, weight
from jaxserve.parallel import mesh

# Up to this many pairwise comparisons, ranking by comparison is one small kernel; a GPU sort takes several.
_FEW = 2**22


class Routing(nnx.Module):
    def __init__(self, spec: Router, hidden: int, *, dtype: jnp.dtype) -> None:
        self.spec = spec
        self.kernel = weight({"router": spec.experts}, {"hidden": hidden}, dtype)
        float32 = jnp.dtype(jnp.float32)
        self.bias = param({"router": spec.experts}, dtype) if spec.bias else None
        self.correction = param({"router": spec.experts}, float32) if spec.correction else None

    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The chosen experts of each token, best first, and their weights in float32: [..., top_k] each."""
        spec = self.spec
        # Products of bfloat16 values are exact in float32, so the weights need no float32 copy.
        logits = matmul(x, self.kernel, outs=("router",), dtype=jnp.dtype(jnp.float32))
        if self.bias is not None:
            logits = logits + lift(self.bias[...].astype(jnp.float32), logits)
        match spec.scoring:
            case "softmax":
                scores = jax.nn.softmax(logits, axis=-1)
            case "sigmoid":
                scores = jax.nn.sigmoid(logits)
            case "softmax_of_chosen":
                scores = logits
        ranked = scores if self.correction is None else scores + lift(self.correction[...], scores)
        if spec.groups > 1:
            ranked = _keep_best_groups(ranked, spec)
        chosen = best(ranked, spec.top_k)
        weights = jnp.take_along_axis(scores, chosen, axis=-1)
        if spec.scoring == "softmax_of_chosen":
            weights = jax.nn.softmax(weights, axis=-1)
        if spec.normalize:
            weights = weights / (jnp.sum(weights, axis=-1, keepdims=True) + spec.norm_eps)
        return chosen, weights * spec.scale


def _keep_best_groups(ranked: jax.Array, spec: Router) -> jax.Array:
    grouped = ranked.reshape(*ranked.shape[:-1], spec.groups, -1)
    if spec.group_score == "max":
        standing = jnp.max(grouped, axis=-1)
    else:
        standing = jnp.sum(jax.lax.top_k(grouped, 2)[0], axis=-1)
    kept = jnp.any(jax.nn.one_hot(best(standing, spec.top_groups), spec.groups, dtype=jnp.bool), axis=-2)
    return jnp.where(kept[..., None], grouped, -jnp.inf).reshape(ranked.shape)


def best(scores: jax.Array, k: int) -> jax.Array:
    """The indices of the k highest scores of each row, highest first; ties go to the lower index."""
    width = scores.shape[-1]
    if scores.size * width > _FEW:
        return jax.lax.top_k(scores, k)[1]
    one, other = scores[..., :, None], scores[..., None, :]
    earlier = jnp.arange(width)[None, :] < jnp.arange(width)[:, None]
    ahead = (other > one) | ((other == one) & lift(earlier, other))
    rank = jnp.sum(ahead, axis=-1, dtype=jnp.int32)
    hit = rank[..., None, :] == lift(jnp.arange(k, dtype=jnp.int32)[:, None], rank[..., None, :])
    return jnp.argmax(hit, axis=-1).astype(jnp.int32)


def placed(ids: jax.Array) -> jax.Array:
    """The position of each entry after a stable sort."""
    count = ids.size
    numbers = jnp.arange(count, dtype=jnp.int32)
    if count * count > _FEW:
        return jnp.zeros_like(numbers).at[jnp.argsort(ids, stable=True)].set(numbers, unique_indices=True)
    before = (ids[None, :] < ids[:, None]) | ((ids[None, :] == ids[:, None]) & (numbers[None, :] < numbers[:, None]))
    return jnp.sum(before, axis=-1, dtype=jnp.int32)


class Experts(nnx.Module):
    def __init__(self, spec: Moe, hidden: int, fitted: Fit, *, dtype: jnp.dtype) -> None:
        experts, width, model = (
            {"experts": spec.router.experts},
            {"mlp": fitted.columns(spec.width)},
            {"hidden": hidden},
        )
        self.spec = spec
        self.gate_up = Linear(experts | {"parts": 2} | width, model, bias=spec.bias, dtype=dtype)
        self.down = Linear(experts | model, width, dtype=dtype)
        self.down_bias = param(experts | model, dtype) if spec.bias else None

    def __call__(self, x: jax.Array, chosen: jax.Array, weights: jax.Array) -> jax.Array:
        tokens = P(*mesh.leading_spec(x, x.ndim - 1)) if mesh.in_mesh() else None
        up_axes, down_axes = ("experts", "parts", "mlp"), ("experts", None, "mlp")
        parameters = {
            "gate_up": (self.gate_up.kernel, up_axes),
            "gate_up_bias": (self.gate_up.bias, up_axes),
            "down": (self.down.kernel, down_axes),
            "down_bias": (self.down_bias, down_axes[:2]),
        }
        held = {name: as_argument(value, axes) for name, (value, axes) in parameters.items() if value is not None}
        arrays, cuts = ({name: pair[i] for name, pair in held.items()} for i in (0, 1))
        run = mesh.island(self._run_shard, (tokens, tokens, tokens, cuts), tokens)
        return run(x, chosen, weights, arrays)

    def _run_shard(self, x: jax.Array, chosen: jax.Array, weights: jax.Array, arrays: dict[str, Any]) -> jax.Array:
        """Run this shard's experts, or its slice of each, and sum over the mesh."""
        here, _, width, hidden = arrays["gate_up"].shape
        ids = chosen.reshape(-1)
        rows = jnp.arange(ids.size, dtype=jnp.int32)
        place = placed(ids)
        order = jnp.zeros_like(rows).at[place].set(rows, unique_indices=True)
        first = mesh.shard_index("experts") * here
        bounds = first + jnp.arange(here + 1, dtype=jnp.int32)
        offsets = jnp.sum(ids[None, :] < bounds[:, None], axis=-1, dtype=jnp.int32)
        tokens = x.reshape(-1, hidden)[order // chosen.shape[-1]]
        mine = jnp.clip(ids[order] - first, 0, here - 1)  # any index for rows of other shards: their result is zero

        both = matmul_grouped(tokens, arrays["gate_up"], offsets)
        both = both.reshape(-1, 2, width)
        if "gate_up_bias" in arrays:
            both = both + arrays["gate_up_bias"][mine].astype(both.dtype)
        out = matmul_grouped(gate(self.spec.activation, both[:, 0], both[:, 1]), arrays["down"], offsets)
        if "down_bias" in arrays:
            # Add the bias on one slice of the width only, and not to rows of other shards.
            ours = (rows >= offsets[0]) & (rows < offsets[-1]) & (mesh.shard_index("mlp") == 0)
            out = out + jnp.where(ours[:, None], arrays["down_bias"][mine].astype(out.dtype), jnp.zeros((), out.dtype))
        # Back to the tokens' order by a gather, since a scatter-add would sum in an undefined order.
        unsorted = out[place].reshape(*chosen.shape, hidden).astype(jnp.float32)
        total = jnp.sum(unsorted * weights[..., None], axis=-2)
        return mesh.sum_over(total.astype(x.dtype), "mlp", "experts")


class MixtureOfExperts(nnx.Module):
    def __init__(self, spec: Moe, hidden: int, fitted: Fit, *, dtype: jnp.dtype) -> None:
        self.spec = spec
        self.router = Routing(spec.router, hidden, dtype=dtype)
        self.experts = Experts(spec, hidden, fitted, dtype=dtype)
        self.shared = FeedForward(spec.shared, hidden, fitted, dtype=dtype) if spec.shared else None
        self.shared_gate = Linear({"parts": 1}, {"hidden": hidden}, dtype=dtype) if spec.shared_gate else None

    def __call__(self, x: jax.Array) -> jax.Array:
        chosen, weights = self.router(x)
        y = self.experts(x, chosen, weights)
        if self.shared is None:
            return y
        shared = self.shared(x)
        if self.shared_gate is not None:
            shared = shared * jax.nn.sigmoid(self.shared_gate(x))
        return y + shared
