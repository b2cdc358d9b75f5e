# SPDX-License-Identifier: Apache-2.0
"""GLM 4 9B (glm) and its 2025 successor (glm4), which also norms the outputs of attention and MLP."""

from jaxserve.models import hf
from jaxserve.models.spec import Layer, ModelSpec
from jaxserve.models.weights import HF_LAYER, LAYER, LLAMA_LIKE, half, linear, norm

WEIGHTS = (
    *norm(f"{LAYER}.attention_out", f"{HF_LAYER}.post_self_attn_layernorm"),
    *norm(f"{LAYER}.mlp_out", f"{HF_LAYER}.post_mlp_layernorm"),
    *linear(f"{LAYER}.mlp.gate", f"{HF_LAYER}.mlp.gate_up_proj", half(0)),
    *linear(f"{LAYER}.mlp.up", f"{HF_LAYER}.mlp.gate_up_proj", half(1)),
    *LLAMA_LIKE,
)


def spec(config: hf.Config) -> ModelSpec:
    norm = hf.rms(config)
    after = norm if config.model_type == "glm4" else None
    layer = Layer(
        attention=hf.attention(config, partial_rotary=True, interleaved=True, qkv_bias=config.attention_bias),
        mlp=hf.mlp(config),
        attention_in=norm,
        attention_out=after,
        mlp_in=norm,
        mlp_out=after,
    )
    return hf.model(config, layers=(layer,) * config.num_hidden_layers, final_norm=norm)
