# SPDX-License-Identifier: Apache-2.0
"""Golden cases of Qwen."""

from tests.golden.case import HUB, SIZES, TIED, TIES, Case

QWEN2 = {**SIZES, "model_type": "qwen2", "rms_norm_eps": 0.02}
QWEN3 = {**SIZES, "model_type": "qwen3", "rms_norm_eps": 0.02, "head_dim": 24}
QWEN2_MOE = {
    **QWEN2,
    "model_type": "qwen2_moe",
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 40,
    "num_experts": 6,
    "num_experts_per_tok": 3,
}
QWEN3_MOE = {
    **QWEN3,
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 32,
    "num_experts": 6,
    "num_experts_per_tok": 2,
}

CASES = [
    Case("qwen2", QWEN2),
    Case("qwen2-head-dim", {**QWEN2, "head_dim": 24}),
    Case("qwen2-tied", {**QWEN2, "tie_word_embeddings": True}, rules=TIED),
    Case(
        "qwen2-window",
        {**QWEN2, "num_hidden_layers": 3, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
        against=[{"layer_types": ["full_attention"] * 3}, {"layer_types": ["sliding_attention"] * 3}],
    ),
    Case(
        "qwen2.5-hub",  # Qwen2.5-7B-Instruct: a window that is off
        {
            **HUB,
            "architectures": ["Qwen2ForCausalLM"],
            "attention_dropout": 0.0,
            "max_window_layers": 1,
            "model_type": "qwen2",
            "rms_norm_eps": 1e-06,
            "rope_theta": 1000000.0,
            "sliding_window": 8,
            "use_sliding_window": False,
        },
        hub=True,
        against=[{"use_sliding_window": True}],
    ),
    Case(
        "qwen2.5-window-hub",
        {
            **HUB,
            "architectures": ["Qwen2ForCausalLM"],
            "attention_dropout": 0.0,
            "max_window_layers": 1,
            "model_type": "qwen2",
            "rms_norm_eps": 1e-06,
            "rope_theta": 1000000.0,
            "sliding_window": 8,
            "use_sliding_window": True,
        },
        hub=True,
        against=[{"use_sliding_window": False}, {"max_window_layers": 0}],
    ),
    Case(
        "qwen2.5-yarn-hub",  # as its model card says to write it
        {
            **HUB,
            "architectures": ["Qwen2ForCausalLM"],
            "attention_dropout": 0.0,
            "max_window_layers": 2,
            "model_type": "qwen2",
            "rms_norm_eps": 1e-06,
            "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 32, "type": "yarn"},
            "rope_theta": 1000000.0,
            "sliding_window": None,
            "use_sliding_window": False,
        },
        hub=True,
        against=[{"rope_scaling": None}],
    ),
    Case("qwen3", QWEN3),
    Case("qwen3-bias-tied", {**QWEN3, "attention_bias": True, "tie_word_embeddings": True}, rules=TIED),
    Case(
        "qwen3-window",
        {**QWEN3, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
        against=[{"layer_types": ["full_attention"] * 2}, {"layer_types": ["sliding_attention"] * 2}],
    ),
    Case(
        "qwen3-hub",  # Qwen3-0.6B
        {
            **HUB,
            "architectures": ["Qwen3ForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "head_dim": 32,
            "max_window_layers": 2,
            "model_type": "qwen3",
            "rms_norm_eps": 1e-06,
            "rope_scaling": None,
            "rope_theta": 1000000,
            "sliding_window": None,
            "tie_word_embeddings": True,
            "use_sliding_window": False,
        },
        hub=True,
        rules=TIED,
    ),
    Case("qwen2-moe", QWEN2_MOE),
    Case("qwen2-moe-norm", {**QWEN2_MOE, "norm_topk_prob": True}, against=[{"norm_topk_prob": False}]),
    Case("qwen2-moe-no-bias", {**QWEN2_MOE, "qkv_bias": False}),
    Case(
        "qwen2-moe-dense-layers",
        {**QWEN2_MOE, "num_hidden_layers": 4, "decoder_sparse_step": 2, "mlp_only_layers": [3]},
    ),
    Case(
        "qwen2-moe-window",
        {
            **QWEN2_MOE,
            "num_hidden_layers": 4,
            "use_sliding_window": True,
            "sliding_window": 8,
            "max_window_layers": 3,
        },
        against=[{"layer_types": ["full_attention"] * 4}],
    ),
    Case(
        "qwen2-moe-hub",  # Qwen1.5-MoE-A2.7B
        {
            **HUB,
            "architectures": ["Qwen2MoeForCausalLM"],
            "attention_dropout": 0.0,
            "decoder_sparse_step": 1,
            "max_window_layers": 2,
            "model_type": "qwen2_moe",
            "moe_intermediate_size": 32,
            "norm_topk_prob": False,
            "num_experts": 6,
            "num_experts_per_tok": 4,
            "num_key_value_heads": 4,
            "output_router_logits": False,
            "rms_norm_eps": 1e-06,
            "rope_theta": 1000000.0,
            "router_aux_loss_coef": 0.001,
            "shared_expert_intermediate_size": 48,
            "sliding_window": 8,
            "use_sliding_window": False,
        },
        hub=True,
    ),
    Case("qwen3-moe", QWEN3_MOE, against=[{"norm_topk_prob": True}]),
    Case("qwen3-moe-norm", {**QWEN3_MOE, "norm_topk_prob": True}),
    Case(
        "qwen3-moe-dense-layers",
        {**QWEN3_MOE, "num_hidden_layers": 4, "decoder_sparse_step": 2, "mlp_only_layers": [1]},
    ),
    Case("qwen3-moe-tie", {**QWEN3_MOE, "num_experts_per_tok": 3}, rules=TIES, lowest_first=True),
    Case(
        "qwen3-moe-window",
        {**QWEN3_MOE, "use_sliding_window": True, "sliding_window": 8},
        against=[{"use_sliding_window": False}],
    ),
    Case(
        "qwen3-moe-hub",  # Qwen3-30B-A3B
        {
            **HUB,
            "architectures": ["Qwen3MoeForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "decoder_sparse_step": 1,
            "head_dim": 32,
            "max_window_layers": 2,
            "mlp_only_layers": [],
            "model_type": "qwen3_moe",
            "moe_intermediate_size": 32,
            "norm_topk_prob": True,
            "num_experts": 8,
            "num_experts_per_tok": 4,
            "output_router_logits": False,
            "rms_norm_eps": 1e-06,
            "rope_scaling": None,
            "rope_theta": 1000000.0,
            "router_aux_loss_coef": 0.001,
            "sliding_window": None,
            "use_sliding_window": False,
        },
        hub=True,
        against=[{"norm_topk_prob": False}],
    ),
]
