# SPDX-License-Identifier: Apache-2.0
"""Llama 2 and 3; Mistral, with a sliding window; Ministral, with one on some layers."""

from dataclasses import replace

from jaxserve.models import hf
from jaxserve.models.spec import Layer, ModelSpec
from jaxserve.models.weights import LLAMA_LIKE

WEIGHTS = LLAMA_LIKE


def spec(config: hf.Config) -> ModelSpec:
    norm = hf.rms(config)
    llama = config.model_type == "llama"
    bias, mlp_bias = (config.attention_bias, config.mlp_bias) if llama else (False, False)
    if not llama:
        config.refuse(attention_bias=False, mlp_bias=False)
    attention = hf.attention(config, qkv_bias=bias, out_bias=bias)
    mlp = hf.mlp(config, bias=mlp_bias, down_bias=mlp_bias)
    layers = (
        Layer(attention=replace(attention, window=window), mlp=mlp, attention_in=norm, mlp_in=norm)
        for window in _windows(config)
    )
    return hf.model(config, layers=tuple(layers), final_norm=norm)


def _windows(config: hf.Config) -> list[int | None]:
    match config.model_type:
        case "ministral":
            return hf.windows(config)
        case "mistral":
            config.refuse("a Ministral has it", layer_types=None)
            return [config.sliding_window] * config.num_hidden_layers
        case _:
            return [None] * config.num_hidden_layers
