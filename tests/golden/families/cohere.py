# SPDX-License-Identifier: Apache-2.0
"""Golden cases of Cohere."""

from tests.golden.case import HUB, SIZES, TIED, Case

COHERE = {**SIZES, "model_type": "cohere", "layer_norm_eps": 0.02, "logit_scale": 0.5, "pad_token_id": 0}
COHERE2 = {
    **COHERE,
    "model_type": "cohere2",
    "num_hidden_layers": 4,
    "sliding_window": 8,
}

CASES = [
    Case("cohere", COHERE, rules=TIED, against=[{"logit_scale": 1.0}]),
    Case("cohere-qk-norm", {**COHERE, "use_qk_norm": True}, rules=TIED),
    Case("cohere-bias-untied", {**COHERE, "attention_bias": True, "tie_word_embeddings": False}),
    Case(
        "cohere-hub",  # c4ai-command-r-v01
        {
            **{key: HUB[key] for key in HUB if key != "tie_word_embeddings"},
            "architectures": ["CohereForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": 5,
            "eos_token_id": 7,
            "layer_norm_eps": 1e-05,
            "logit_scale": 0.5,
            "model_max_length": 131072,
            "model_type": "cohere",
            "num_key_value_heads": 4,
            "pad_token_id": 0,
            "rope_theta": 8000000.0,
            "use_qk_norm": False,
        },
        hub=True,
        rules=TIED,
    ),
    Case("cohere2", COHERE2, rules=TIED, against=[{"layer_types": ["full_attention"] * 4}]),
    Case(
        "cohere2-hub",  # c4ai-command-r7b-12-2024
        {
            **{key: HUB[key] for key in HUB if key != "tie_word_embeddings"},
            "architectures": ["Cohere2ForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": 5,
            "cache_implementation": "hybrid",
            "eos_token_id": 7,
            "head_dim": 16,
            "layer_norm_eps": 1e-05,
            "layer_switch": 4,
            "logit_scale": 0.25,
            "model_type": "cohere2",
            "num_hidden_layers": 3,
            "order_of_interleaved_layers": "local_attn_first",
            "pad_token_id": 0,
            "position_embedding_type": "rope_gptj",
            "rope_scaling": None,
            "rope_theta": 50000,
            "rotary_pct": 1.0,
            "sliding_window": 8,
            "sliding_window_pattern": 3,
            "use_embedding_sharing": True,
            "use_gated_activation": True,
            "use_parallel_block": True,
            "use_parallel_embedding": True,
        },
        hub=True,
        rules=TIED,
        against=[{"sliding_window": 100}, {"sliding_window_pattern": 2}],
    ),
]
