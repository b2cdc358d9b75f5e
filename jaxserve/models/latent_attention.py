# SPDX-License-Identifier: Apache-2.0
"""DeepSeek's multi-head latent attention.

Serving uses the absorbed form: the keys' up-projection is folded into the query and the values' is applied after
attention, so that all heads read one latent per token. The dense form expands keys and values, as in training.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from jaxserve.models.attention import Core, Options, Paged
from jaxserve.models.kv_cache import LayerCache
from jaxserve.models.layers import Linear, Normalize
from jaxserve.models.linear import matmul_each
from jaxserve.models.rope import Angles, rotate
from jaxserve.models.spec import LatentAttention
from jaxserve.models.weight import weight
from jaxserve.parallel import mesh


class MultiHeadLatentAttention(nnx.Module):
    def __init__(self, spec: LatentAttention, hidden: int, *, dtype: jnp.dtype) -> None:
        self.spec = spec
        query = {"heads": spec.heads, "head_dim": spec.nope_dim + spec.rope_dim}
        model, rank = {"hidden": hidden}, {"latent": spec.kv_rank}
        if spec.q_rank is None:
            self.q = Linear(query, model, dtype=dtype)
        else:
            self.q_down = Linear({"latent": spec.q_rank}, model, bias=spec.bias, dtype=dtype)
            self.q_norm = Normalize(spec.norm, {"latent": spec.q_rank}, dtype=dtype)
            self.q = Linear(query, {"latent": spec.q_rank}, dtype=dtype)
        self.kv_down = Linear({"latent": spec.kv_rank + spec.rope_dim}, model, bias=spec.bias, dtype=dtype)
        self.kv_norm = Normalize(spec.norm, rank, dtype=dtype)
        self.k_up = weight({"heads": spec.heads, "head_dim": spec.nope_dim}, rank, dtype)
        self.v_up = weight({"heads": spec.heads, "head_dim": spec.v_dim}, rank, dtype)
        self.out = Linear(model, {"heads": spec.heads, "head_dim": spec.v_dim}, bias=spec.bias, dtype=dtype)

    def __call__(self, x: jax.Array, turn: Angles | None, core: Core) -> tuple[jax.Array, LayerCache | None]:
        assert turn is not None
        spec = self.spec
        q = self.q(x if spec.q_rank is None else self.q_norm(self.q_down(x)))
        q_nope, q_rope = q[..., : spec.nope_dim], q[..., spec.nope_dim :]
        q_rope = rotate(q_rope, turn, interleaved=spec.rope.interleaved)
        compressed = self.kv_down(x)
        latent = self.kv_norm(compressed[..., : spec.kv_rank])
        k_rope = rotate(compressed[..., None, spec.kv_rank :], turn, interleaved=spec.rope.interleaved)
        if isinstance(core, Paged):
            absorbed = matmul_each("thd,hdr->thr", q_nope, self.k_up)
            query = jnp.concatenate((absorbed, q_rope), axis=-1)
            keys = jnp.concatenate((latent, k_rope[..., 0, :]), axis=-1)
            out, cache = core.attend_latent(query, keys, latent_dim=spec.kv_rank, scale=spec.scale)
            return self.out(matmul_each("thr,hdr->thd", out, self.v_up)), cache
        k_nope = matmul_each("bsr,hdr->bshd", latent, self.k_up)
        v = matmul_each("bsr,hdr->bshd", latent, self.v_up)
        k_rope = jnp.broadcast_to(k_rope, (*k_nope.shape[:-1], spec.rope_dim), out_sharding=_like(k_nope))
        k = jnp.concatenate((k_nope, k_rope), axis=-1)
        query = jnp.concatenate((q_nope, q_rope), axis=-1)[..., None, :]  # every head has its own key
        out, _ = core.attend(query, k, v, sinks=None, options=Options(scale=spec.scale))
        return self.out(out[..., 0, :]), None


def _like(array: jax.Array) -> jax.sharding.PartitionSpec | None:
    return mesh.out_sharding(array, array.ndim, ())
