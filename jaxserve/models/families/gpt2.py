# SPDX-License-Identifier: Apache-2.0
"""GPT-2: learned positions, and kernels stored as [inputs, outputs]."""

from jaxserve.models import hf
from jaxserve.models.spec import Layer, ModelSpec
from jaxserve.models.weights import (
    LAYER,
    Rule,
    chained,
    linear,
    norm,
    qkv,
    renamed,
    stacked_qkv,
    transposed,
)

_IN = "transformer.h.{layer}"
_NAMES = (
    Rule("embed.weight", "transformer.wte.weight"),
    Rule("positions.weight", "transformer.wpe.weight"),
    Rule("head", "lm_head.weight"),
    *norm("final_norm", "transformer.ln_f"),
    *norm(f"{LAYER}.attention_in", f"{_IN}.ln_1"),
    *norm(f"{LAYER}.mlp_in", f"{_IN}.ln_2"),
    *qkv(f"{LAYER}.attention", f"{_IN}.attn.c_attn", lambda part: chained(transposed, stacked_qkv(part))),
    *linear(f"{LAYER}.attention.out", f"{_IN}.attn.c_proj", transposed),
    *linear(f"{LAYER}.mlp.up", f"{_IN}.mlp.c_fc", transposed),
    *linear(f"{LAYER}.mlp.down", f"{_IN}.mlp.c_proj", transposed),
)
WEIGHTS = (*_NAMES, *renamed(_NAMES, {"transformer.": ""}))


def spec(config: hf.Config) -> ModelSpec:
    config.refuse(add_cross_attention=False)
    norm = hf.layer_norm(config.layer_norm_epsilon)
    heads = config.num_attention_heads
    head_dim = config.hidden_size // heads
    scale = head_dim**-0.5 if config.scale_attn_weights else 1.0
    mlp = hf.mlp(
        config,
        width=4 * config.hidden_size if config.n_inner is None else config.n_inner,
        activation=hf.activation(config.activation_function),
        gated=False,
        bias=True,
        down_bias=True,
    )

    def layer(index: int) -> Layer:
        share = index + 1 if config.scale_attn_by_inverse_layer_idx else 1
        attention = hf.attention(
            config, head_dim=head_dim, kv_heads=heads, rope=None, scale=scale / share, qkv_bias=True, out_bias=True
        )
        return Layer(attention=attention, mlp=mlp, attention_in=norm, mlp_in=norm)

    return hf.model(
        config,
        layers=tuple(map(layer, range(config.num_hidden_layers))),
        final_norm=norm,
        learned_positions=config.max_position_embeddings,
    )
