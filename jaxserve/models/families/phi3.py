# SPDX-License-Identifier: Apache-2.0
"""Phi 3, 3.5 and 4: Llama with fused weights, a sliding window, and LongRoPE."""

from jaxserve.models import hf
from jaxserve.models.spec import Layer, ModelSpec
from jaxserve.models.weights import HF_LAYER, LAYER, LLAMA_LIKE, half, linear, qkv, stacked_qkv

WEIGHTS = (
    *qkv(f"{LAYER}.attention", f"{HF_LAYER}.self_attn.qkv_proj", stacked_qkv),
    *linear(f"{LAYER}.mlp.gate", f"{HF_LAYER}.mlp.gate_up_proj", half(0)),
    *linear(f"{LAYER}.mlp.up", f"{HF_LAYER}.mlp.gate_up_proj", half(1)),
    *LLAMA_LIKE,
)


def spec(config: hf.Config) -> ModelSpec:
    config.refuse(attention_bias=False, mlp_bias=False, lm_head_bias=False)
    norm = hf.rms(config)
    layer = Layer(
        attention=hf.attention(config, partial_rotary=True, window=config.sliding_window),
        mlp=hf.mlp(config),
        attention_in=norm,
        mlp_in=norm,
    )
    return hf.model(config, layers=(layer,) * config.num_hidden_layers, final_norm=norm)
