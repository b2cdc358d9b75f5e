# SPDX-License-Identifier: Apache-2.0
"""Golden cases of Llama."""

from tests.golden.case import HUB, LONG, PLAIN, SIZES, TIED, Case, rope
from tests.golden.weights import Rules

LLAMA = {**SIZES, "model_type": "llama", "rms_norm_eps": 0.02}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}

CASES = [
    Case("llama-mha", {**LLAMA, "num_key_value_heads": 4, **rope(rope_type="default", rope_theta=500.0)}),
    Case("llama-gqa-tied", {**LLAMA, "tie_word_embeddings": True}, rules=TIED),
    # Both in the file and not equal: transformers then does not tie them, whatever the config says.
    Case("llama-tied-with-head", {**LLAMA, "tie_word_embeddings": True}, extra={"lm_head.weight": [96, 64]}),
    Case(
        "llama-tied-head-only",
        {**LLAMA, "tie_word_embeddings": True},
        rename=[(r"^model\.embed_tokens\.", "lm_head.")],
        rules=Rules(gains={"lm_head": 1.6}),
    ),
    Case("llama-mqa-3-layers", {**LLAMA, "num_key_value_heads": 1, "num_hidden_layers": 3}),
    Case("llama-bias", {**LLAMA, "attention_bias": True, "mlp_bias": True}),
    Case("llama-head-dim", {**LLAMA, "head_dim": 24}),
    Case("llama-gelu", {**LLAMA, "hidden_act": "gelu_pytorch_tanh"}),
    Case("llama-rope-linear", {**LLAMA, **rope(rope_type="linear", factor=4.0)}, against=[{"rope_parameters": PLAIN}]),
    Case(
        # Only the prompt goes beyond the original length: there each new token changes the frequencies,
        # and what a cache holds was made with others.
        "llama-rope-dynamic",
        {**LLAMA, "max_position_embeddings": 48, **rope(rope_type="dynamic", factor=2.0)},
        prompt=60,
        against=[{"rope_parameters": PLAIN}],
    ),
    Case(
        "llama-rope-dynamic-short",
        {**LLAMA, "max_position_embeddings": 64, **rope(rope_type="dynamic", factor=2.0)},
    ),
    Case(
        "llama-rope-yarn",
        {**LLAMA, **rope(rope_type="yarn", factor=4.0, original_max_position_embeddings=32)},
        against=[{"rope_parameters": PLAIN}],
    ),
    Case(
        "llama-rope-yarn-mscale",
        {
            **LLAMA,
            **rope(
                rope_type="yarn",
                factor=4.0,
                original_max_position_embeddings=32,
                beta_fast=16,
                beta_slow=2,
                mscale=1.2,
                mscale_all_dim=0.7,
                truncate=False,
            ),
        },
    ),
    Case(
        "llama-rope-yarn-attention-factor",
        {
            **LLAMA,
            **rope(rope_type="yarn", factor=4.0, original_max_position_embeddings=32, attention_factor=1.4),
        },
    ),
    Case("llama-rope-llama3", {**LLAMA, "rope_parameters": LLAMA3}, against=[{"rope_parameters": PLAIN}]),
    Case("llama-rope-longrope-short", {**LLAMA, "rope_parameters": LONG}, against=[{"rope_parameters": PLAIN}]),
    Case(
        "llama-rope-longrope-long",
        {**LLAMA, "rope_parameters": {**LONG, "original_max_position_embeddings": 20}},
        greedy_prompt=24,
        against=[{"rope_parameters": PLAIN}],
    ),
    Case(
        "llama-rope-longrope-factor",
        {**LLAMA, "rope_parameters": {**LONG, "original_max_position_embeddings": 20, "factor": 16.0}},
        greedy_prompt=24,
    ),
    Case(
        "llama2-hub",  # Llama-2-7b: no rope_theta; its files hold inv_freq
        {
            **HUB,
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "num_key_value_heads": 4,
            "pretraining_tp": 1,
            "rms_norm_eps": 1e-05,
            "rope_scaling": None,
        },
        hub=True,
        unread={f"model.layers.{n}.self_attn.rotary_emb.inv_freq": [8] for n in range(2)},
    ),
    Case(
        "llama3.1-hub",
        {
            **HUB,
            "architectures": ["LlamaForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "eos_token_id": [2, 3, 4],
            "mlp_bias": False,
            "model_type": "llama",
            "pretraining_tp": 1,
            "rms_norm_eps": 1e-05,
            "rope_scaling": {
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
                "rope_type": "llama3",
            },
            "rope_theta": 500000.0,
        },
        hub=True,
        against=[{"rope_scaling": None}, {"rope_theta": 10000.0}],
    ),
    Case(
        "llama-rope-type-hub",  # LongChat and others: "type" instead of "rope_type", no num_key_value_heads
        {
            **{key: HUB[key] for key in HUB if key != "num_key_value_heads"},
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "rms_norm_eps": 1e-06,
            "rope_scaling": {"factor": 8.0, "type": "linear"},
        },
        hub=True,
        against=[{"rope_scaling": None}],
    ),
]
