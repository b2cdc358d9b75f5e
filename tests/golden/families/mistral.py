# SPDX-License-Identifier: Apache-2.0
"""Golden cases of Mistral and Mixtral."""

from tests.golden.case import HUB, SIZES, TIES, Case

MISTRAL = {**SIZES, "model_type": "mistral", "rms_norm_eps": 0.02}
MIXTRAL = {
    **SIZES,
    "model_type": "mixtral",
    "rms_norm_eps": 0.02,
    "num_local_experts": 6,
    "num_experts_per_tok": 2,
    "sliding_window": None,
}

CASES = [
    Case("mistral-full", {**MISTRAL, "sliding_window": None}),
    Case("mistral-window", {**MISTRAL, "sliding_window": 8}, against=[{"sliding_window": None}, {"sliding_window": 9}]),
    Case("mistral-head-dim", {**MISTRAL, "sliding_window": None, "head_dim": 24}),
    Case(
        "mistral-hub",  # Mistral-7B-v0.1
        {
            **HUB,
            "architectures": ["MistralForCausalLM"],
            "model_type": "mistral",
            "rms_norm_eps": 1e-05,
            "rope_theta": 10000.0,
            "sliding_window": 8,
        },
        hub=True,
        against=[{"sliding_window": None}],
    ),
    Case(
        "mistral-nemo-hub",
        {
            **HUB,
            "architectures": ["MistralForCausalLM"],
            "attention_dropout": 0.0,
            "head_dim": 24,
            "model_type": "mistral",
            "rms_norm_eps": 1e-05,
            "rope_theta": 1000000.0,
            "sliding_window": None,
        },
        hub=True,
    ),
    Case("mixtral", MIXTRAL),
    Case("mixtral-window", {**MIXTRAL, "sliding_window": 8, "head_dim": 24}, against=[{"sliding_window": None}]),
    Case("mixtral-tie", MIXTRAL, rules=TIES, lowest_first=True),
    Case(
        "mixtral-hub",  # Mixtral-8x7B-v0.1
        {
            **HUB,
            "architectures": ["MixtralForCausalLM"],
            "attention_dropout": 0.0,
            "model_type": "mixtral",
            "num_experts_per_tok": 2,
            "num_local_experts": 8,
            "output_router_logits": False,
            "rms_norm_eps": 1e-05,
            "rope_theta": 1000000.0,
            "router_aux_loss_coef": 0.02,
            "sliding_window": None,
        },
        hub=True,
    ),
]
