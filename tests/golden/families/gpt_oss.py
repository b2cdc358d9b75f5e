# SPDX-License-Identifier: Apache-2.0
"""Golden cases of gpt-oss."""

from tests.golden.case import HUB, PLAIN, SIZES, TIED, Case

GPT_OSS = {
    **SIZES,
    "model_type": "gpt_oss",
    "rms_norm_eps": 0.02,
    "num_hidden_layers": 3,
    "head_dim": 24,
    "num_local_experts": 6,
    "num_experts_per_tok": 2,
    "sliding_window": 8,
    "swiglu_limit": 1.5,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 16,
    },
}

CASES = [
    Case(
        "gpt-oss",
        GPT_OSS,
        against=[{"layer_types": ["full_attention"] * 3}, {"rope_parameters": PLAIN}, {"swiglu_limit": 100.0}],
    ),
    Case(
        "gpt-oss-switches",
        {
            **GPT_OSS,
            "attention_bias": False,
            "rope_parameters": PLAIN,
            "swiglu_alpha": 1.2,
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
            "tie_word_embeddings": True,
        },
        rules=TIED,
    ),
    Case(
        "gpt-oss-hub",  # gpt-oss-20b, with its experts in bfloat16
        {
            **HUB,
            "architectures": ["GptOssForCausalLM"],
            "attention_bias": True,
            "attention_dropout": 0.0,
            "experts_per_token": 2,
            "head_dim": 24,
            "initial_context_length": 32,
            "layer_types": ["sliding_attention", "full_attention"],
            "model_type": "gpt_oss",
            "num_experts_per_tok": 2,
            "num_local_experts": 4,
            "output_router_logits": False,
            "pad_token_id": 3,
            "rms_norm_eps": 1e-05,
            "rope_scaling": {
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "factor": 32.0,
                "original_max_position_embeddings": 32,
                "rope_type": "yarn",
                "truncate": False,
            },
            "rope_theta": 150000,
            "router_aux_loss_coef": 0.9,
            "sliding_window": 8,
            "swiglu_limit": 7.0,
        },
        hub=True,
        against=[{"sliding_window": 100}, {"rope_scaling": None}],
    ),
]
