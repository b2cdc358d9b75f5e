# SPDX-License-Identifier: Apache-2.0
"""StableLM 2 and 3B: layer norms, and partial RoPE; the 12B runs the MLP parallel to attention."""

from jaxserve.models import hf
from jaxserve.models.spec import Layer, ModelSpec
from jaxserve.models.weights import HF_LAYER, LAYER, LLAMA_LIKE, Rule

# The checkpoint stores one norm tensor per head, so heads use the {expert} placeholder.
WEIGHTS = (
    Rule(f"{LAYER}.attention.q_norm.weight", f"{HF_LAYER}.self_attn.q_layernorm.norms.{{expert}}.weight"),
    Rule(f"{LAYER}.attention.k_norm.weight", f"{HF_LAYER}.self_attn.k_layernorm.norms.{{expert}}.weight"),
    *LLAMA_LIKE,
)


def spec(config: hf.Config) -> ModelSpec:
    norm, parallel = hf.layer_norm(config.layer_norm_eps), config.use_parallel_residual
    layer = Layer(
        attention=hf.attention(
            config,
            partial_rotary=True,
            qkv_bias=config.use_qkv_bias,
            qk_norm=hf.layer_norm(config.layer_norm_eps, bias=False) if config.qk_layernorm else None,
            qk_norm_over="own_head",
        ),
        mlp=hf.mlp(config),
        attention_in=norm,
        mlp_in=None if parallel else norm,
        parallel=parallel,
    )
    return hf.model(config, layers=(layer,) * config.num_hidden_layers, final_norm=norm)
