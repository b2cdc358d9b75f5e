# SPDX-License-Identifier: Apache-2.0
"""GPT-NeoX and Pythia: the MLP is parallel to attention, with a separate norm, or sequential."""

from jaxserve.models import hf
from jaxserve.models.spec import Layer, ModelSpec
from jaxserve.models.weights import LAYER, Rule, grouped_qkv, linear, norm, qkv

_IN = "gpt_neox.layers.{layer}"
WEIGHTS = (
    Rule("embed.weight", "gpt_neox.embed_in.weight"),
    Rule("head", "embed_out.weight"),
    Rule("head", "lm_head.weight"),
    *norm("final_norm", "gpt_neox.final_layer_norm"),
    *norm(f"{LAYER}.attention_in", f"{_IN}.input_layernorm"),
    *norm(f"{LAYER}.mlp_in", f"{_IN}.post_attention_layernorm"),
    *qkv(f"{LAYER}.attention", f"{_IN}.attention.query_key_value", grouped_qkv),
    *linear(f"{LAYER}.attention.out", f"{_IN}.attention.dense"),
    *linear(f"{LAYER}.mlp.up", f"{_IN}.mlp.dense_h_to_4h"),
    *linear(f"{LAYER}.mlp.down", f"{_IN}.mlp.dense_4h_to_h"),
)


def spec(config: hf.Config) -> ModelSpec:
    norm, bias = hf.layer_norm(config.layer_norm_eps), config.attention_bias
    layer = Layer(
        attention=hf.attention(
            config, kv_heads=config.num_attention_heads, partial_rotary=True, qkv_bias=bias, out_bias=bias
        ),
        mlp=hf.mlp(config, gated=False, bias=True, down_bias=True),
        attention_in=norm,
        mlp_in=norm,
        parallel=config.use_parallel_residual,
    )
    return hf.model(config, layers=(layer,) * config.num_hidden_layers, final_norm=norm)
