# SPDX-License-Identifier: Apache-2.0
"""SmolLM 3: Llama with some layers without RoPE (NoPE)."""

from dataclasses import replace

from jaxserve.errors import CheckpointError
from jaxserve.models import hf
from jaxserve.models.spec import Layer, ModelSpec
from jaxserve.models.weights import LLAMA_LIKE

WEIGHTS = LLAMA_LIKE


def spec(config: hf.Config) -> ModelSpec:
    norm, bias, mlp_bias = hf.rms(config), config.attention_bias, config.mlp_bias
    windows, turned = hf.windows(config), config.no_rope_layers
    if len(turned) < len(windows):
        problem = f"config.json lists {len(turned)} no_rope_layers for {len(windows)} layers"
        raise CheckpointError(problem, "check the file")
    if any(windows):
        # With a window, transformers' attention implementations disagree.
        config.refuse(use_sliding_window=True)
    attention = hf.attention(config, qkv_bias=bias, out_bias=bias)
    mlp = hf.mlp(config, bias=mlp_bias, down_bias=mlp_bias)
    layers = tuple(
        Layer(
            attention=replace(attention, window=window, rope=attention.rope if turns else None),
            mlp=mlp,
            attention_in=norm,
            mlp_in=norm,
        )
        for window, turns in zip(windows, turned, strict=False)
    )
    return hf.model(config, layers=layers, final_norm=norm)
