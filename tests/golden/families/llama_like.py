# SPDX-License-Identifier: Apache-2.0
"""Golden cases of OLMo 2, Granite, StarCoder2 and SmolLM3."""

from tests.golden.case import HUB, SIZES, TIED, Case
from tests.golden.weights import Rules

OLMO2_TIED = Rules(gains={"embed_tokens": 0.3, "bias": 0.3})
OLMO2 = {**SIZES, "model_type": "olmo2", "rms_norm_eps": 0.02, "pad_token_id": 3}
GRANITE = {
    **SIZES,
    "model_type": "granite",
    "rms_norm_eps": 0.02,
    "attention_multiplier": 0.4,
    "embedding_multiplier": 3.0,
    "logits_scaling": 2.5,
    "residual_multiplier": 1.5,
}
STARCODER2 = {**SIZES, "model_type": "starcoder2", "norm_epsilon": 0.02}
SMOLLM3 = {
    **SIZES,
    "model_type": "smollm3",
    "rms_norm_eps": 0.02,
    "num_hidden_layers": 4,
    "pad_token_id": 3,
    "tie_word_embeddings": False,
}

CASES = [
    Case("olmo2", OLMO2),
    Case("olmo2-bias-tied", {**OLMO2, "attention_bias": True, "tie_word_embeddings": True}, rules=OLMO2_TIED),
    Case(
        "olmo2-hub",  # OLMo-2-1124-7B
        {
            **HUB,
            "architectures": ["Olmo2ForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "model_type": "olmo2",
            "num_key_value_heads": 4,
            "pad_token_id": 3,
            "rms_norm_eps": 1e-06,
            "rope_scaling": None,
            "rope_theta": 500000,
        },
        hub=True,
    ),
    Case("granite", GRANITE),
    Case("granite-bias", {**GRANITE, "attention_bias": True, "mlp_bias": True}),
    Case(
        "granite-hub",  # granite-3.1-8b-instruct
        {
            **HUB,
            "architectures": ["GraniteForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.1,
            "attention_multiplier": 0.4,
            "embedding_multiplier": 1.5,
            "logits_scaling": 3.0,
            "mlp_bias": False,
            "model_type": "granite",
            "pad_token_id": 0,
            "residual_multiplier": 0.7,
            "rms_norm_eps": 1e-05,
            "rope_scaling": None,
            "rope_theta": 10000000.0,
            "tie_word_embeddings": True,
        },
        hub=True,
        rules=TIED,
        against=[
            {"attention_multiplier": 0.25},
            {"embedding_multiplier": 1.0},
            {"logits_scaling": 1.0},
            {"residual_multiplier": 1.0},
        ],
    ),
    Case("starcoder2", {**STARCODER2, "tie_word_embeddings": False}),
    Case("starcoder2-tied", {**STARCODER2, "tie_word_embeddings": True}, rules=TIED),
    Case("starcoder2-no-bias", {**STARCODER2, "use_bias": False, "tie_word_embeddings": False}),
    Case(
        "starcoder2-hub",  # starcoder2-3b
        {
            **{key: HUB[key] for key in HUB if key != "tie_word_embeddings"},
            "activation_function": "gelu",
            "architectures": ["Starcoder2ForCausalLM"],
            "attention_dropout": 0.1,
            "attention_softmax_in_fp32": True,
            "embedding_dropout": 0.1,
            "hidden_act": "gelu_pytorch_tanh",
            "layer_norm_epsilon": 1e-05,
            "mlp_type": "default",
            "model_type": "starcoder2",
            "norm_epsilon": 1e-05,
            "norm_type": "layer_norm",
            "residual_dropout": 0.1,
            "rope_theta": 999999.4420358813,
            "scale_attention_softmax_in_fp32": True,
            "scale_attn_weights": True,
            "sliding_window": 8,
            "use_bias": True,
        },
        hub=True,
        rules=TIED,
        against=[{"sliding_window": None}],
    ),
    Case("smollm3", SMOLLM3, against=[{"no_rope_layers": [1, 1, 1, 1]}, {"no_rope_layers": [0, 1, 1, 1]}]),
    Case("smollm3-layers", {**SMOLLM3, "no_rope_layers": [0, 1, 1, 0], "attention_bias": True, "mlp_bias": True}),
    Case(
        "smollm3-window",
        {**SMOLLM3, "no_rope_layer_interval": 2, "use_sliding_window": True, "sliding_window": 8},
        against=[{"layer_types": ["full_attention"] * 4}],
    ),
    Case(
        "smollm3-hub",  # SmolLM3-3B
        {
            **{key: HUB[key] for key in HUB if key != "tie_word_embeddings"},
            "architectures": ["SmolLM3ForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "layer_types": ["full_attention"] * 4,
            "max_window_layers": 28,
            "mlp_bias": False,
            "model_type": "smollm3",
            "no_rope_layer_interval": 4,
            "no_rope_layers": [1, 1, 1, 0],
            "num_hidden_layers": 4,
            "pad_token_id": 3,
            "pretraining_tp": 2,
            "rms_norm_eps": 1e-06,
            "rope_scaling": None,
            "rope_theta": 5000000.0,
            "sliding_window": None,
            "use_sliding_window": False,
        },
        hub=True,
        rules=TIED,
    ),
]
