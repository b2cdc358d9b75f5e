# SPDX-License-Identifier: Apache-2.0
"""Golden cases of Gemma."""

from tests.golden.case import HUB, SIZES, Case
from tests.golden.weights import Rules

# Gemma multiplies its embeddings by the square root of the hidden size, 8 here, and adds 1 to its norms.
GEMMA_TIED = Rules(gains={"embed_tokens": 0.09}, centres={"norm.weight": 0.0})
GEMMA = {**SIZES, "model_type": "gemma", "rms_norm_eps": 0.02, "head_dim": 24, "tie_word_embeddings": True}
GEMMA2 = {
    **GEMMA,
    "model_type": "gemma2",
    "num_hidden_layers": 4,
    "query_pre_attn_scalar": 40,
    "sliding_window": 8,
    "attn_logit_softcapping": 3.0,
    "final_logit_softcapping": 4.0,
}
GEMMA3 = {
    **GEMMA,
    "model_type": "gemma3_text",
    "num_hidden_layers": 4,
    "query_pre_attn_scalar": 40,
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"],
    "rope_parameters": {
        "full_attention": {"rope_type": "default", "rope_theta": 5000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    },
}

CASES = [
    Case("gemma", GEMMA, rules=GEMMA_TIED),
    Case("gemma-untied", {**GEMMA, "tie_word_embeddings": False}, rules=GEMMA_TIED),
    Case(
        "gemma-hub",  # gemma-7b: hidden_act says gelu and means its tanh form
        {
            **HUB,
            "architectures": ["GemmaForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": 2,
            "eos_token_id": 1,
            "head_dim": 24,
            "hidden_act": "gelu",
            "hidden_activation": None,
            "model_type": "gemma",
            "num_key_value_heads": 1,
            "pad_token_id": 0,
            "rms_norm_eps": 1e-06,
            "rope_scaling": None,
            "rope_theta": 10000.0,
            "tie_word_embeddings": True,
        },
        hub=True,
        rules=GEMMA_TIED,
    ),
    Case(
        "gemma2",
        GEMMA2,
        rules=GEMMA_TIED,
        against=[
            {"final_logit_softcapping": None},
            {"attn_logit_softcapping": None},
            {"query_pre_attn_scalar": 16},
            {"sliding_window": 100},
            {"layer_types": ["full_attention", "sliding_attention"] * 2},
        ],
    ),
    Case(
        "gemma2-no-caps",
        {**GEMMA2, "final_logit_softcapping": None, "attn_logit_softcapping": None, "attention_bias": True},
        rules=GEMMA_TIED,
    ),
    Case(
        "gemma2-hub",  # gemma-2-27b: neither layer_types nor tie_word_embeddings
        {
            **{key: HUB[key] for key in HUB if key != "tie_word_embeddings"},
            "architectures": ["Gemma2ForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "attn_logit_softcapping": 5.0,
            "bos_token_id": 2,
            "cache_implementation": "hybrid",
            "eos_token_id": 1,
            "final_logit_softcapping": 6.0,
            "head_dim": 24,
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_activation": "gelu_pytorch_tanh",
            "model_type": "gemma2",
            "num_hidden_layers": 3,
            "pad_token_id": 0,
            "query_pre_attn_scalar": 16,
            "rms_norm_eps": 1e-06,
            "rope_theta": 10000.0,
            "sliding_window": 8,
            "sliding_window_size": 8,
        },
        hub=True,
        rules=GEMMA_TIED,
        against=[{"sliding_window": 100}],
    ),
    Case(
        "gemma3",
        GEMMA3,
        rules=GEMMA_TIED,
        against=[
            {"query_pre_attn_scalar": 16},
            {"sliding_window": 100},
            {"layer_types": ["full_attention", "sliding_attention", "sliding_attention", "sliding_attention"]},
        ],
    ),
    Case(
        "gemma3-linear-caps",
        {
            **GEMMA3,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 6.0,
            "attention_bias": True,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 500.0, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            },
        },
        rules=GEMMA_TIED,
    ),
    Case(
        "gemma3-hub",  # gemma-3-1b-it
        {
            **{key: HUB[key] for key in HUB if key not in ("tie_word_embeddings", "hidden_act")},
            "architectures": ["Gemma3ForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "attn_logit_softcapping": None,
            "bos_token_id": 2,
            "cache_implementation": "hybrid",
            "eos_token_id": [1, 106],
            "final_logit_softcapping": None,
            "head_dim": 24,
            "hidden_activation": "gelu_pytorch_tanh",
            "model_type": "gemma3_text",
            "num_hidden_layers": 4,
            "num_key_value_heads": 1,
            "pad_token_id": 0,
            "query_pre_attn_scalar": 24,
            "rms_norm_eps": 1e-06,
            "rope_local_base_freq": 100,
            "rope_scaling": None,
            "rope_theta": 1000,
            "sliding_window": 8,
            "sliding_window_pattern": 3,
        },
        hub=True,
        rules=GEMMA_TIED,
        against=[{"rope_local_base_freq": 1000}, {"rope_theta": 100}, {"sliding_window_pattern": 2}],
    ),
    Case(
        "gemma3-vision-hub",  # gemma-3-4b-it; only its text is run
        {
            "architectures": ["Gemma3ForConditionalGeneration"],
            "boi_token_index": 90,
            "eoi_token_index": 91,
            "eos_token_id": [1, 106],
            "image_token_index": 262144,
            "initializer_range": 0.02,
            "mm_tokens_per_image": 4,
            "model_type": "gemma3",
            "text_config": {
                "head_dim": 24,
                "hidden_size": 64,
                "intermediate_size": 96,
                "max_position_embeddings": 128,
                "model_type": "gemma3_text",
                "num_attention_heads": 4,
                "num_hidden_layers": 7,
                "num_key_value_heads": 2,
                "query_pre_attn_scalar": 24,
                "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
                "sliding_window": 8,
                "vocab_size": 96,
            },
            "torch_dtype": "bfloat16",
            "transformers_version": "4.50.0.dev0",
            "vision_config": {
                "hidden_size": 16,
                "image_size": 28,
                "intermediate_size": 24,
                "model_type": "siglip_vision_model",
                "num_attention_heads": 2,
                "num_hidden_layers": 1,
                "patch_size": 14,
                "vision_use_head": False,
            },
        },
        hub=True,
        rules=GEMMA_TIED,
        rename=[(r"^vision_tower\.", "vision_tower.vision_model.")],
    ),
]
