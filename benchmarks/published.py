# SPDX-License-Identifier: Apache-2.0
"""The specs of published models, from the values in their config.json, and of a toy model."""

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

from jaxserve.models.families import deepseek, llama, qwen
from jaxserve.models.hf import Config
from jaxserve.models.spec import ModelSpec, Moe, Rope, Router


def llama_8b() -> ModelSpec:
    config = SimpleNamespace(
        model_type="llama",
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        attention_bias=False,
        mlp_bias=False,
        hidden_act="silu",
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    )
    return llama.spec(Config(config))


def qwen3_30b_a3b() -> ModelSpec:
    config = SimpleNamespace(
        model_type="qwen3_moe",
        vocab_size=151936,
        hidden_size=2048,
        intermediate_size=6144,
        num_hidden_layers=48,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        attention_bias=False,
        hidden_act="silu",
        max_position_embeddings=40960,
        sliding_window=None,
        rms_norm_eps=1e-6,
        tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
        num_experts=128,
        num_experts_per_tok=8,
        moe_intermediate_size=768,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        mlp_only_layers=[],
    )
    return qwen.spec(Config(config))


def deepseek_v2_lite() -> ModelSpec:
    config = SimpleNamespace(
        model_type="deepseek_v2",
        vocab_size=102400,
        hidden_size=2048,
        intermediate_size=10944,
        num_hidden_layers=27,
        num_attention_heads=16,
        num_key_value_heads=16,
        q_lora_rank=None,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        attention_bias=False,
        mlp_bias=False,
        hidden_act="silu",
        max_position_embeddings=163840,
        rms_norm_eps=1e-6,
        tie_word_embeddings=False,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 40.0,
            "original_max_position_embeddings": 4096,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale": 0.707,
            "mscale_all_dim": 0.707,
        },
        n_routed_experts=64,
        n_shared_experts=2,
        num_experts_per_tok=6,
        moe_intermediate_size=1408,
        first_k_dense_replace=1,
        moe_layer_freq=1,
        norm_topk_prob=False,
        routed_scaling_factor=1.0,
        scoring_func="softmax",
        topk_method="greedy",
        n_group=1,
        topk_group=1,
    )
    return deepseek.spec(Config(config))


def tiny() -> ModelSpec:
    spec = qwen3_30b_a3b()
    layer = spec.layers[0]
    attention = replace(layer.attention, heads=4, kv_heads=2, head_dim=16, rope=Rope(dim=16, base=1e4))
    mlp = Moe(router=Router(experts=4, top_k=2, scoring="softmax"), width=24, activation="silu")
    layers = (replace(layer, attention=attention, mlp=mlp),) * 2
    return replace(spec, vocab_size=96, hidden=32, layers=layers)


MODELS: dict[str, Callable[[], ModelSpec]] = {
    "llama-8b": llama_8b,
    "qwen3-30b-a3b": qwen3_30b_a3b,
    "deepseek-v2-lite": deepseek_v2_lite,
}
