# SPDX-License-Identifier: Apache-2.0
"""Golden cases of GPT-NeoX."""

from tests.golden.case import HUB, PLAIN, SIZES, Case
from tests.golden.weights import Rules

NEOX_TIED = Rules(gains={"embed_in": 0.3, "bias": 0.3})
NEOX = {
    **{key: SIZES[key] for key in SIZES if key != "num_key_value_heads"},
    "model_type": "gpt_neox",
    "layer_norm_eps": 0.02,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
}

CASES = [
    Case("gpt-neox-parallel", NEOX, against=[{"use_parallel_residual": False}]),
    Case("gpt-neox-sequential", {**NEOX, "use_parallel_residual": False}),
    Case("gpt-neox-no-bias", {**NEOX, "attention_bias": False}),
    Case(
        "gpt-neox-sequential-tied",
        {**NEOX, "use_parallel_residual": False, "tie_word_embeddings": True},
        rules=NEOX_TIED,
    ),
    Case(
        "gpt-neox-yarn",  # on a part of each head
        {
            **NEOX,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.5,
                "factor": 4.0,
                "original_max_position_embeddings": 32,
            },
        },
        against=[{"rope_parameters": {**PLAIN, "partial_rotary_factor": 0.5}}],
    ),
    Case(
        "gpt-neox-hub",  # pythia-70m; its files hold masks and inv_freq
        {
            **{key: HUB[key] for key in HUB if key != "num_key_value_heads"},
            "architectures": ["GPTNeoXForCausalLM"],
            "bos_token_id": 0,
            "eos_token_id": 0,
            "hidden_act": "gelu",
            "layer_norm_eps": 1e-05,
            "model_type": "gpt_neox",
            "rotary_emb_base": 1000,
            "rotary_pct": 0.5,
            "use_parallel_residual": True,
        },
        hub=True,
        against=[{"rotary_emb_base": 10000}, {"rotary_pct": 1.0}],
        rename=[(r"^lm_head\.", "embed_out.")],
        unread={
            f"gpt_neox.layers.{n}.attention.{name}": shape
            for n in range(2)
            for name, shape in {"bias": [1, 1, 128, 128], "masked_bias": [], "rotary_emb.inv_freq": [4]}.items()
        },
    ),
]
