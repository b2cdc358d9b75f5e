# SPDX-License-Identifier: Apache-2.0
"""Granite: Llama with multipliers on embeddings, attention, residuals and logits."""

from jaxserve.models import hf
from jaxserve.models.spec import Layer, ModelSpec
from jaxserve.models.weights import LLAMA_LIKE

WEIGHTS = LLAMA_LIKE


def spec(config: hf.Config) -> ModelSpec:
    norm = hf.rms(config)
    bias, mlp_bias = config.attention_bias, config.mlp_bias
    layer = Layer(
        attention=hf.attention(config, scale=float(config.attention_multiplier), qkv_bias=bias, out_bias=bias),
        mlp=hf.mlp(config, bias=mlp_bias, down_bias=mlp_bias),
        attention_in=norm,
        mlp_in=norm,
        residual_scale=float(config.residual_multiplier),
    )
    return hf.model(
        config,
        layers=(layer,) * config.num_hidden_layers,
        final_norm=norm,
        embed_scale=float(config.embedding_multiplier),
        logit_scale=1 / config.logits_scaling,
    )
