# SPDX-License-Identifier: Apache-2.0
"""Attention of one layer and its two implementations: over paged KV (serving) and dense (scoring, training).

A layer computes queries, keys and values and passes them to either kind of `Core`. Queries are grouped by the KV head
they share, so that sharding along the KV heads covers all of attention.
"""

from dataclasses import dataclass
from typing import Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from jaxserve.models.cache_groups import STATE, one_group
from jaxserve.models.inputs import ModelInputs, PagedTokens
from jaxserve.models.kv_cache import SCALES, LayerCache
from jaxserve.models.layers import Linear, Normalize, lift
from jaxserve.models.recurrent import Stateful
from jaxserve.models.rope import Angles, rotate
from jaxserve.models.spec import Attention, ModelSpec
from jaxserve.models.weight import param
from jaxserve.parallel import mesh
from pallas_kernels import dispatch
from pallas_kernels.kv_write import kv_write, latent_write
from pallas_kernels.mla_attention import mla_attention
from pallas_kernels.paged_attention import paged_attention


@dataclass(frozen=True)
class Options:
    """A core's parameters besides the arrays."""

    scale: float
    window: int | None = None
    soft_cap: float | None = None


class Cores(Protocol):
    """The cores of all layers, which run in order."""

    def of(self, layer: int) -> "Core | Stateful": ...

    def keep(self, layer: int, cache: LayerCache | None) -> None:
        """Take the layer's cache after it has run."""
        ...


class Core(Protocol):
    def attend(
        self, q: jax.Array, k: jax.Array, v: jax.Array, *, sinks: jax.Array | None, options: Options
    ) -> tuple[jax.Array, LayerCache | None]:
        """q [..., kv_heads, group, dim], k and v [..., kv_heads, dim] -> [..., kv_heads, group, v_dim]."""
        ...


class GroupedAttention(nnx.Module):
    def __init__(self, spec: Attention, hidden: int, *, kv_repeat: int, dtype: jnp.dtype) -> None:
        self.spec = spec
        kv_heads, group = spec.kv_heads * kv_repeat, spec.group // kv_repeat
        heads = {"kv_heads": kv_heads, "group": group, "head_dim": spec.head_dim}
        # For each KV head: its queries, then its key, then its value.
        self.qkv = Linear(heads | {"group": group + 2}, {"hidden": hidden}, bias=spec.qkv_bias, dtype=dtype)
        self.out = Linear({"hidden": hidden}, heads, bias=spec.out_bias, dtype=dtype)
        keys = {"kv_heads": kv_heads, "head_dim": spec.head_dim}
        if spec.qk_norm_over == "head":
            heads = keys = {"head_dim": spec.head_dim}
        own = spec.qk_norm_over == "own_head"  # each head has its own weights, but the norm is not over the head axes
        self.q_norm = Normalize(spec.qk_norm, heads, own=2 * own, dtype=dtype) if spec.qk_norm else None
        self.k_norm = Normalize(spec.qk_norm, keys, own=1 * own, dtype=dtype) if spec.qk_norm else None
        self.sinks = param({"kv_heads": kv_heads, "group": group}, jnp.dtype(jnp.float32)) if spec.sinks else None

    def __call__(self, x: jax.Array, turn: Angles | None, core: Core) -> tuple[jax.Array, LayerCache | None]:
        qkv = self.qkv(x)
        group = qkv.shape[-2] - 2
        q, k, v = qkv[..., :group, :], qkv[..., group, :], qkv[..., group + 1, :]
        if not self.spec.norm_after_rope:
            q, k = self._norm(q, k)
        if self.spec.rope is not None:
            assert turn is not None
            cos, sin = turn
            q = rotate(q, (cos[..., None, :], sin[..., None, :]), interleaved=self.spec.rope.interleaved)
            k = rotate(k, turn, interleaved=self.spec.rope.interleaved)
        if self.spec.norm_after_rope:
            q, k = self._norm(q, k)
        options = Options(scale=self.spec.scale, window=self.spec.window, soft_cap=self.spec.soft_cap)
        sinks = None if self.sinks is None else self.sinks[...]
        out, cache = core.attend(q, k, v, sinks=sinks, options=options)
        return self.out(out), cache

    def _norm(self, q: jax.Array, k: jax.Array) -> tuple[jax.Array, jax.Array]:
        if self.q_norm is None or self.k_norm is None:
            return q, k
        return self.q_norm(q), self.k_norm(k)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Paged:
    """Writes the new tokens' KV into this layer's pools, then attends over the pools."""

    tokens: PagedTokens
    cache: LayerCache

    def attend(
        self, q: jax.Array, k: jax.Array, v: jax.Array, *, sinks: jax.Array | None, options: Options
    ) -> tuple[jax.Array, LayerCache | None]:
        dtype = self.cache["k"].dtype
        one_byte = dtype.itemsize == 1
        # Kernels compute in the dtype of the queries. Values of one byte are exact in float16, and reach it in fewer
        # instructions than bfloat16; scales are applied in float32.
        computed = dtype if not one_byte else q.dtype if dispatch.implementation() == "cpu" else jnp.dtype(jnp.float16)

        def local(
            q: jax.Array, k: jax.Array, v: jax.Array, sinks: jax.Array | None, cache: LayerCache, tokens: PagedTokens
        ) -> tuple[jax.Array, LayerCache]:
            new = (k, v) if one_byte else (k.astype(dtype), v.astype(dtype))
            scales = {name: cache[name] for name in SCALES if name in cache}
            written = kv_write(cache["k"], cache["v"], *new, tokens.slots, **scales)
            scales = {name: getattr(written, name) for name in scales}
            out = paged_attention(
                q.astype(computed).reshape(q.shape[0], -1, q.shape[-1]),
                written.k_pool,
                written.v_pool,
                tokens.ragged,
                sinks=None if sinks is None else sinks.reshape(-1),
                scale=options.scale,
                window=options.window,
                soft_cap=options.soft_cap,
                **scales,
            )
            out = out.reshape(*q.shape[:-1], v.shape[-1]).astype(q.dtype)
            return out, {"k": written.k_pool, "v": written.v_pool, **scales}

        heads, pool = mesh.partition((None, "kv_heads")), mesh.partition((None, None, "kv_heads"))
        pools = dict.fromkeys(self.cache, pool)
        specs = heads, heads, heads, None if sinks is None else mesh.partition(("kv_heads",)), pools, P()
        return mesh.island(local, specs, (heads, pools))(q, k, v, sinks, self.cache, self.tokens)

    def attend_latent(
        self, q: jax.Array, latent: jax.Array, *, latent_dim: int, scale: float
    ) -> tuple[jax.Array, LayerCache]:
        """q [tokens, heads, latent + rope] over latents [tokens, latent + rope] -> [tokens, heads, latent]."""

        def local(q: jax.Array, latent: jax.Array, pool: jax.Array, tokens: PagedTokens) -> tuple[jax.Array, jax.Array]:
            pool = latent_write(pool, latent.astype(pool.dtype), tokens.slots)
            out = mla_attention(q.astype(pool.dtype), pool, tokens.ragged, latent_dim=latent_dim, scale=scale)
            return out.astype(q.dtype), pool

        heads = mesh.partition((None, "heads"))
        run = mesh.island(local, (heads, P(), P(), P()), (heads, P()))
        out, pool = run(q, latent, self.cache["latent"], self.tokens)
        return out, {"latent": pool}


class CachedLayers:
    """Cores over the cache of all layers. Layers of different groups at one place share a pool, so each gets it as the
    one before left it."""

    def __init__(self, spec: ModelSpec, inputs: ModelInputs, pools: list[LayerCache]) -> None:
        self._at = (inputs.groups or one_group(spec)).at
        self._inputs, self.pools = inputs, list(pools)

    def of(self, layer: int) -> "Core | Stateful":
        (group, place), paged, rows = self._at[layer], self._inputs.paged, self._inputs.rows
        if group == STATE:
            assert rows is not None
            return Stateful(rows, paged[0].ragged, self.pools[place])
        return Paged(paged[group], self.pools[place])

    def keep(self, layer: int, cache: LayerCache | None) -> None:
        if cache is not None:
            self.pools[self._at[layer][1]] = cache


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Dense:
    """Causal attention within [batch, length] sequences, optionally padded on the right; keeps no cache. One core for
    all layers."""

    def of(self, layer: int) -> "Dense":
        return self

    def keep(self, layer: int, cache: LayerCache | None) -> None:
        pass

    def attend(
        self, q: jax.Array, k: jax.Array, v: jax.Array, *, sinks: jax.Array | None, options: Options
    ) -> tuple[jax.Array, LayerCache | None]:
        # The scores of all queries together would be length^2 per head, so process them in chunks.
        length = q.shape[1]
        chunk = min(length, 512)
        starts = range(0, length, chunk)
        attend = jax.checkpoint(_attend_chunk, static_argnums=(4, 5)) if len(starts) > 1 else _attend_chunk
        outs: list[jax.Array] = []
        for start in starts:
            stop = min(start + chunk, length)
            first = 0 if options.window is None else max(0, start - options.window + 1)
            outs.append(attend(q[:, start:stop], k[:, first:stop], v[:, first:stop], sinks, start - first, options))
        return jnp.concatenate(outs, axis=1), None


def _attend_chunk(
    q: jax.Array, k: jax.Array, v: jax.Array, sinks: jax.Array | None, ahead: int, options: Options
) -> jax.Array:
    """Attention of queries over all keys up to the last query; the first query is `ahead` positions after the first
    key."""
    scores = jnp.einsum("bqkgd,bskd->bkgqs", q, k, preferred_element_type=jnp.float32) * options.scale
    if options.soft_cap is not None:
        scores = options.soft_cap * jnp.tanh(scores / options.soft_cap)
    distance = (ahead + jnp.arange(q.shape[1]))[:, None] - jnp.arange(k.shape[1])[None, :]
    seen = distance >= 0 if options.window is None else (distance >= 0) & (distance < options.window)
    scores = jnp.where(lift(seen, scores), scores, -jnp.inf)
    top = jnp.max(scores, axis=-1, keepdims=True)
    if sinks is not None:
        sinks = sinks[None, :, :, None, None]
        top = jnp.maximum(top, sinks)
    weights = jnp.exp(scores - top)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    if sinks is not None:
        total = total + jnp.exp(sinks - top)
    return jnp.einsum("bkgqs,bskd->bqkgd", (weights / total).astype(v.dtype), v)
