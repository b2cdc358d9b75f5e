# SPDX-License-Identifier: Apache-2.0
"""Cohere's Command R, and R7B (cohere2): parallel attention and MLP after one norm, and scaled logits."""

from dataclasses import replace

from jaxserve.models import hf
from jaxserve.models.spec import Layer, ModelSpec
from jaxserve.models.weights import LLAMA_LIKE

WEIGHTS = LLAMA_LIKE


def spec(config: hf.Config) -> ModelSpec:
    norm, bias = hf.layer_norm(config.layer_norm_eps, bias=False), config.attention_bias
    second = config.model_type == "cohere2"
    if second:
        config.refuse(position_embedding_type="rope_gptj", rotary_pct=1.0, use_qk_norm=False)
        config.refuse(use_gated_activation=True, use_parallel_block=True)
    attention = hf.attention(
        config,
        interleaved=True,
        qkv_bias=bias,
        out_bias=bias,
        qk_norm=norm if not second and config.use_qk_norm else None,
        qk_norm_over="own_head",
    )
    layer = Layer(attention=attention, mlp=hf.mlp(config), attention_in=norm, parallel=True)
    layers = (layer,) * config.num_hidden_layers
    if second:  # layers with full attention have no RoPE
        kinds = (replace(attention, window=w, rope=attention.rope if w else None) for w in hf.windows(config))
        layers = tuple(replace(layer, attention=kind) for kind in kinds)
    return hf.model(config, layers=layers, final_norm=norm, logit_scale=float(config.logit_scale))
