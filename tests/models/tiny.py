# SPDX-License-Identifier: Apache-2.0
"""Small specs of each kind that divide by 8, with random parameters."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.models import param_layout
from jaxserve.models.decoder import Params
from jaxserve.models.spec import (
    Attention,
    LatentAttention,
    Layer,
    Mlp,
    ModelSpec,
    Moe,
    Norm,
    Rope,
    Router,
)

NORM = Norm(eps=1e-6)


def model(*layers: Layer, tied: bool = False) -> ModelSpec:
    # 98 rows of vocabulary divide by 2 alone.
    return ModelSpec(
        family="tiny", vocab_size=98, hidden=32, max_positions=128, layers=layers, final_norm=NORM, tied=tied
    )


def grouped(kv_heads: int = 2, window: int | None = None, **options: Any) -> Attention:
    rope = Rope(dim=8, base=10_000.0)
    scale = 8**-0.5
    return Attention(
        heads=8, kv_heads=kv_heads, head_dim=8, scale=scale, rope=rope, window=window, qk_norm=NORM, **options
    )


MLA = LatentAttention(
    heads=8,
    q_rank=24,
    kv_rank=16,
    nope_dim=8,
    rope_dim=4,
    v_dim=8,
    scale=12**-0.5,
    rope=Rope(dim=4, base=1e4),
    norm=NORM,
)
# 60 and 12 columns do not divide by 8 either.
MLP = Mlp(width=60, activation="silu", bias=True, down_bias=True)
MOE = Moe(
    router=Router(experts=8, top_k=3, scoring="softmax", normalize=True),
    width=12,
    activation="silu",
    bias=True,
    shared=Mlp(width=16, activation="silu"),
)


def block(attention: Attention | LatentAttention, mlp: Mlp | Moe) -> Layer:
    return Layer(attention=attention, mlp=mlp, attention_in=NORM, mlp_in=NORM)


SPECS = {
    "dense": model(
        block(grouped(qkv_bias=True, out_bias=True, sinks=True), MLP), block(grouped(window=6), MLP), tied=True
    ),
    "one-kv-head": model(block(grouped(kv_heads=1), MLP)),
    "moe": model(block(grouped(), MOE), block(grouped(), MLP)),
    "mla": model(block(MLA, MLP), block(MLA, MOE)),
}


def public_params(spec: ModelSpec, seed: int = 0) -> Params:
    """Wide, so that errors show."""
    random = np.random.default_rng(seed)
    params: Params = {}
    for path, leaf in param_layout.leaves(param_layout.abstract_public(spec, jnp.float32)):
        values = random.normal(size=leaf.shape)
        if path[-1] == "weight" and len(leaf.shape) == 1:
            values = 1 + 0.3 * values
        elif path[-1] in ("kernel", "k_up", "v_up", "head"):
            values = 1.2 * values * leaf.shape[-1] ** -0.5
        param_layout.put(params, path, jnp.asarray(values.astype(np.float32)))
    return params


def tokens(batch: int = 2, length: int = 20) -> jax.Array:
    return jnp.asarray(np.random.default_rng(7).integers(0, 98, (batch, length)), jnp.int32)


# One program each: outside of a jit, each of their many small steps compiles one.
engine_params = jax.jit(param_layout.to_engine_layout, static_argnums=0)
public_again = jax.jit(param_layout.to_public_layout, static_argnums=0)
