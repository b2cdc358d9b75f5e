# SPDX-License-Identifier: Apache-2.0
"""Gemma 1: Llama with scaled embeddings and norms whose weights are offsets from 1."""

import math

from jaxserve.models import hf
from jaxserve.models.spec import Layer, ModelSpec
from jaxserve.models.weights import LLAMA_LIKE

WEIGHTS = LLAMA_LIKE


def spec(config: hf.Config) -> ModelSpec:
    config.refuse(use_bidirectional_attention=False)
    norm = hf.rms(config, offset=1.0)
    bias = config.attention_bias
    layer = Layer(
        attention=hf.attention(config, qkv_bias=bias, out_bias=bias),
        mlp=hf.mlp(config),
        attention_in=norm,
        mlp_in=norm,
    )
    return hf.model(
        config,
        layers=(layer,) * config.num_hidden_layers,
        final_norm=norm,
        embed_scale=math.sqrt(config.hidden_size),
    )
