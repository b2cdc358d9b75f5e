# SPDX-License-Identifier: Apache-2.0
"""Qwen 2, 2.5 and 3, dense and mixture of experts."""

from typing import Any

from jaxserve.models import hf
from jaxserve.models.spec import Layer, Mlp, ModelSpec, Moe, Router
from jaxserve.models.weights import LLAMA_LIKE, MOE_LIKE

WEIGHTS = (*LLAMA_LIKE, *MOE_LIKE)


def spec(config: hf.Config) -> ModelSpec:
    norm = hf.rms(config)
    match config.model_type:
        case "qwen2":
            options: dict[str, Any] = dict(qkv_bias=True)
        case "qwen2_moe":
            options = dict(qkv_bias=config.qkv_bias)
        case _:
            bias = config.attention_bias
            options = dict(qkv_bias=bias, out_bias=bias, qk_norm=norm)
    layers = tuple(
        Layer(
            attention=hf.attention(config, window=window, **options),
            mlp=_moe(config) if _is_sparse(config, i) else hf.mlp(config),
            attention_in=norm,
            mlp_in=norm,
        )
        for i, window in enumerate(_windows(config))
    )
    return hf.model(config, layers=layers, final_norm=norm)


def _windows(config: hf.Config) -> list[int | None]:
    if config.model_type == "qwen3_moe":
        config.refuse("the window is one for all layers here", layer_types=None)
        return [config.sliding_window] * config.num_hidden_layers
    return hf.windows(config)


def _is_sparse(config: hf.Config, layer: int) -> bool:
    if not config.model_type.endswith("_moe") or layer in config.mlp_only_layers:
        return False
    return config.num_experts > 0 and (layer + 1) % config.decoder_sparse_step == 0


def _moe(config: hf.Config) -> Moe:
    shared = config.model_type == "qwen2_moe"
    activation = hf.activation(config.hidden_act)
    return Moe(
        router=Router(
            experts=config.num_experts,
            top_k=config.num_experts_per_tok,
            scoring="softmax",
            normalize=config.norm_topk_prob,
        ),
        width=config.moe_intermediate_size,
        activation=activation,
        shared=Mlp(width=config.shared_expert_intermediate_size, activation=activation) if shared else None,
        shared_gate=shared,
    )
