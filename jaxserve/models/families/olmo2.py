# SPDX-License-Identifier: Apache-2.0
"""OLMo 2: norms after attention and MLP, and QK norms that span all heads."""

from jaxserve.models import hf
from jaxserve.models.spec import Layer, ModelSpec
from jaxserve.models.weights import HF_LAYER, LAYER, LLAMA_LIKE, norm

WEIGHTS = (
    *LLAMA_LIKE,
    *norm(f"{LAYER}.attention_out", f"{HF_LAYER}.post_attention_layernorm"),
    *norm(f"{LAYER}.mlp_out", f"{HF_LAYER}.post_feedforward_layernorm"),
)


def spec(config: hf.Config) -> ModelSpec:
    norm, bias = hf.rms(config), config.attention_bias
    layer = Layer(
        attention=hf.attention(config, qkv_bias=bias, out_bias=bias, qk_norm=norm, qk_norm_over="all_heads"),
        mlp=hf.mlp(config),
        attention_out=norm,
        mlp_out=norm,
    )
    return hf.model(config, layers=(layer,) * config.num_hidden_layers, final_norm=norm)
