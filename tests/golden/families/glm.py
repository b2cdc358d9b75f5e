# SPDX-License-Identifier: Apache-2.0
"""Golden cases of GLM."""

from tests.golden.case import HUB, PLAIN, SIZES, TIED, Case

GLM = {**SIZES, "model_type": "glm", "rms_norm_eps": 0.02, "head_dim": 24, "pad_token_id": 3, "eos_token_id": [2]}

CASES = [
    Case("glm", GLM, against=[{"rope_parameters": {**PLAIN, "partial_rotary_factor": 1.0}}]),
    Case("glm-no-bias-tied", {**GLM, "attention_bias": False, "tie_word_embeddings": True}, rules=TIED),
    Case(
        "glm-linear",  # on a part of each head, in pairs
        {**GLM, "rope_parameters": {**PLAIN, "rope_type": "linear", "factor": 4.0, "partial_rotary_factor": 0.5}},
        against=[{"rope_parameters": {**PLAIN, "partial_rotary_factor": 0.5}}],
    ),
    Case("glm4", {**GLM, "model_type": "glm4", "attention_bias": False}),
    Case("glm4-bias", {**GLM, "model_type": "glm4", "attention_bias": True, "head_dim": 16}),
    Case(
        "glm-hub",  # glm-4-9b-chat-hf
        {
            **HUB,
            "architectures": ["GlmForCausalLM"],
            "attention_bias": True,
            "attention_dropout": 0.0,
            "eos_token_id": [2, 3],
            "head_dim": 24,
            "model_type": "glm",
            "pad_token_id": 3,
            "partial_rotary_factor": 0.5,
            "rms_norm_eps": 1.5625e-07,
            "rope_theta": 10000.0,
        },
        hub=True,
    ),
    Case(
        "glm4-hub",  # GLM-4-9B-0414
        {
            **HUB,
            "architectures": ["Glm4ForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "eos_token_id": [2, 3],
            "head_dim": 24,
            "model_type": "glm4",
            "pad_token_id": 3,
            "partial_rotary_factor": 0.5,
            "rms_norm_eps": 1e-05,
            "rope_theta": 10000.0,
        },
        hub=True,
    ),
]
