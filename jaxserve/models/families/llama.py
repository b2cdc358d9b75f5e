# SPDX-License-Identifier: Apache-2.0
"""Llama 2 and 3, and Mistral: the same with a window."""

from jaxserve.models import hf
from jaxserve.models.spec import Layer, Mlp, ModelSpec
from jaxserve.models.weights import LLAMA_LIKE

WEIGHTS = LLAMA_LIKE


def spec(config: hf.Config) -> ModelSpec:
    norm = hf.rms(config)
    bias, mlp_bias = config.get("attention_bias", False), config.get("mlp_bias", False)
    window = config.sliding_window if config.model_type == "mistral" else None
    layer = Layer(
        attention=hf.attention(config, window=window, qkv_bias=bias, out_bias=bias),
        mlp=Mlp(
            width=config.intermediate_size,
            activation=hf.activation(config.hidden_act),
            bias=mlp_bias,
            down_bias=mlp_bias,
        ),
        attention_in=norm,
        mlp_in=norm,
    )
    return hf.model(config, layers=(layer,) * config.num_hidden_layers, final_norm=norm)
