# SPDX-License-Identifier: Apache-2.0
"""Phi 1, 1.5 and 2: parallel attention and MLP after one norm, and biases everywhere."""

from jaxserve.models import hf
from jaxserve.models.spec import Layer, ModelSpec
from jaxserve.models.weights import HF_LAYER, LAYER, LLAMA_LIKE, linear, norm

WEIGHTS = (
    *norm("final_norm", "model.final_layernorm"),
    *linear(f"{LAYER}.attention.out", f"{HF_LAYER}.self_attn.dense"),
    *norm(f"{LAYER}.attention.q_norm", f"{HF_LAYER}.self_attn.q_layernorm"),
    *norm(f"{LAYER}.attention.k_norm", f"{HF_LAYER}.self_attn.k_layernorm"),
    *linear(f"{LAYER}.mlp.up", f"{HF_LAYER}.mlp.fc1"),
    *linear(f"{LAYER}.mlp.down", f"{HF_LAYER}.mlp.fc2"),
    *LLAMA_LIKE,
)


def spec(config: hf.Config) -> ModelSpec:
    norm = hf.layer_norm(config.layer_norm_eps)
    layer = Layer(
        attention=hf.attention(
            config,
            partial_rotary=True,
            qkv_bias=True,
            out_bias=True,
            qk_norm=norm if config.qk_layernorm else None,
        ),
        mlp=hf.mlp(config, gated=False, bias=True, down_bias=True),
        attention_in=norm,
        parallel=True,
    )
    return hf.model(config, layers=(layer,) * config.num_hidden_layers, final_norm=norm, head_bias=True)
