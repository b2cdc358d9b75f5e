# SPDX-License-Identifier: Apache-2.0
"""StarCoder 2: layer norms, biases, an MLP without gate, and a sliding window."""

from jaxserve.models import hf
from jaxserve.models.spec import Layer, ModelSpec
from jaxserve.models.weights import HF_LAYER, LAYER, LLAMA_LIKE, linear

WEIGHTS = (
    *linear(f"{LAYER}.mlp.up", f"{HF_LAYER}.mlp.c_fc"),
    *linear(f"{LAYER}.mlp.down", f"{HF_LAYER}.mlp.c_proj"),
    *LLAMA_LIKE,
)


def spec(config: hf.Config) -> ModelSpec:
    config.refuse(mlp_type="default", norm_type="layer_norm")
    norm, bias = hf.layer_norm(config.norm_epsilon), config.use_bias
    layer = Layer(
        attention=hf.attention(config, window=config.sliding_window, qkv_bias=bias, out_bias=bias),
        mlp=hf.mlp(config, gated=False, bias=bias, down_bias=bias),
        attention_in=norm,
        mlp_in=norm,
    )
    return hf.model(config, layers=(layer,) * config.num_hidden_layers, final_norm=norm)
