# SPDX-License-Identifier: Apache-2.0
"""DeepSeek V2 and V3 (and R1): latent attention (MLA), grouped experts, shared experts."""

from typing import Any

import numpy as np

from jaxserve.models import hf
from jaxserve.models.spec import LatentAttention, Layer, Mlp, ModelSpec, Moe, Norm, Router
from jaxserve.models.weights import HF_LAYER, LAYER, LLAMA_LIKE, MOE_LIKE, Rule, View, linear, norm


def _up(part: int) -> View:
    """For rows grouped by head: the head's key rows, then its value rows."""

    def view(array: np.ndarray[Any, Any], layer: Layer | None) -> np.ndarray[Any, Any]:
        assert layer is not None and isinstance(layer.attention, LatentAttention)
        mla = layer.attention
        heads = array.reshape(mla.heads, mla.nope_dim + mla.v_dim, *array.shape[1:])
        return heads[:, mla.nope_dim :] if part else heads[:, : mla.nope_dim]

    return view


_MLA, _HF_MLA, _SHARED = f"{LAYER}.attention", f"{HF_LAYER}.self_attn", f"{HF_LAYER}.mlp.shared_experts"

WEIGHTS = (
    Rule(f"{_MLA}.q.kernel", f"{_HF_MLA}.q_b_proj.weight"),
    *linear(f"{_MLA}.q_down", f"{_HF_MLA}.q_a_proj"),
    *norm(f"{_MLA}.q_norm", f"{_HF_MLA}.q_a_layernorm"),
    *linear(f"{_MLA}.kv_down", f"{_HF_MLA}.kv_a_proj_with_mqa"),
    *norm(f"{_MLA}.kv_norm", f"{_HF_MLA}.kv_a_layernorm"),
    Rule(f"{_MLA}.k_up", f"{_HF_MLA}.kv_b_proj.weight", _up(0)),
    Rule(f"{_MLA}.v_up", f"{_HF_MLA}.kv_b_proj.weight", _up(1)),
    *LLAMA_LIKE,
    *MOE_LIKE,
    Rule(f"{LAYER}.mlp.router.correction", f"{HF_LAYER}.mlp.gate.e_score_correction_bias"),
    *linear(f"{LAYER}.mlp.shared.gate", f"{_SHARED}.gate_proj"),
    *linear(f"{LAYER}.mlp.shared.up", f"{_SHARED}.up_proj"),
    *linear(f"{LAYER}.mlp.shared.down", f"{_SHARED}.down_proj"),
)
# The multi-token prediction (MTP) layer.
IGNORED = (r"^model\.layers\.{layers}\.",)


def spec(config: hf.Config) -> ModelSpec:
    config.refuse(num_key_value_heads=config.num_attention_heads, moe_layer_freq=1)
    norm = hf.rms(config)
    bias = config.mlp_bias if config.model_type == "deepseek_v2" else False
    dense = hf.mlp(config, bias=bias, down_bias=bias)
    moe = Moe(
        router=_router(config),
        width=config.moe_intermediate_size,
        activation=dense.activation,
        shared=hf.mlp(config, width=config.moe_intermediate_size * config.n_shared_experts, bias=bias, down_bias=bias),
    )

    def layer(mlp: Mlp | Moe) -> Layer:
        return Layer(attention=_attention(config), mlp=mlp, attention_in=norm, mlp_in=norm)

    count = config.num_hidden_layers
    first = min(config.first_k_dense_replace, count)
    layers = (layer(dense),) * first + (layer(moe),) * (count - first)
    return hf.model(config, layers=layers, final_norm=norm)


def _attention(config: hf.Config) -> LatentAttention:
    scale = (config.qk_nope_head_dim + config.qk_rope_head_dim) ** -0.5
    given = config.rope_parameters
    if given["rope_type"] != "default" and given.get("mscale_all_dim"):
        scale *= hf.yarn_mscale(given["factor"], given["mscale_all_dim"]) ** 2
    interleaved = config.model_type == "deepseek_v2" or bool(config.rope_interleave)
    return LatentAttention(
        heads=config.num_attention_heads,
        q_rank=config.q_lora_rank,
        kv_rank=config.kv_lora_rank,
        nope_dim=config.qk_nope_head_dim,
        rope_dim=config.qk_rope_head_dim,
        v_dim=config.v_head_dim,
        scale=scale,
        rope=hf.rope(config, config.qk_rope_head_dim, interleaved=interleaved),
        norm=Norm(eps=1e-6),  # fixed, regardless of rms_norm_eps
        bias=config.attention_bias,
    )


def _router(config: hf.Config) -> Router:
    shared: dict[str, Any] = dict(
        experts=config.n_routed_experts, top_k=config.num_experts_per_tok, scale=float(config.routed_scaling_factor)
    )
    if config.model_type == "deepseek_v2":
        # With norm_topk_prob, transformers and DeepSeek's own code disagree.
        config.refuse(scoring_func="softmax", norm_topk_prob=False)
        groups: dict[str, Any] = dict(groups=config.n_group, top_groups=config.topk_group)
        if config.topk_method != "group_limited_greedy":
            config.refuse(topk_method="greedy")
            groups = {}
        return Router(scoring="softmax", **groups, **shared)
    config.refuse(scoring_func="sigmoid", topk_method="noaux_tc")
    return Router(
        scoring="sigmoid",
        correction=True,
        normalize=bool(config.norm_topk_prob),
        norm_eps=1e-20,
        groups=config.n_group,
        top_groups=config.topk_group,
        group_score="top2_sum",
        **shared,
    )
