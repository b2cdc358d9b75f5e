# SPDX-License-Identifier: Apache-2.0
"""Every field of every family's config has its effect or is harmless; unsupported values are rejected by name."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from jaxserve.errors import CheckpointError
from jaxserve.models import registry
from jaxserve.models.spec import Attention, ModelSpec
from tests.models import harmless
from tests.models.harmless import HARMLESS

SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 3,
}
GPT2 = {"vocab_size": 96, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}
DEEPSEEK = {"first_k_dense_replace": 1, "num_experts_per_tok": 2, "n_group": 4, "topk_group": 2}
MIXED = ["full_attention", "sliding_attention"]

# Configs that go through every branch of their family's page.
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "cohere": ("CohereForCausalLM", {}),
    "cohere2": ("Cohere2ForCausalLM", {}),
    "deepseek_v2": ("DeepseekV2ForCausalLM", {**DEEPSEEK, "topk_method": "group_limited_greedy"}),
    "deepseek_v3": ("DeepseekV3ForCausalLM", DEEPSEEK),
    "falcon": ("FalconForCausalLM", {"new_decoder_architecture": True}),
    "gemma": ("GemmaForCausalLM", {}),
    "gemma2": ("Gemma2ForCausalLM", {}),
    "gemma3": ("Gemma3ForConditionalGeneration", {"text_config": SIZES}),
    "gemma3_text": ("Gemma3ForCausalLM", {}),
    "glm": ("GlmForCausalLM", {"head_dim": 16}),
    "glm4": ("Glm4ForCausalLM", {"head_dim": 16}),
    "gpt2": ("GPT2LMHeadModel", {}),
    "gpt_neox": ("GPTNeoXForCausalLM", {}),
    "gpt_oss": ("GptOssForCausalLM", {}),
    "granite": ("GraniteForCausalLM", {}),
    "llama": ("LlamaForCausalLM", {}),
    "ministral": ("MinistralForCausalLM", {"head_dim": 16}),
    "mistral": ("MistralForCausalLM", {}),
    "mixtral": ("MixtralForCausalLM", {}),
    "olmo2": ("Olmo2ForCausalLM", {}),
    "opt": ("OPTForCausalLM", {}),
    "phi": ("PhiForCausalLM", {}),
    "phi3": ("Phi3ForCausalLM", {}),
    "qwen2": ("Qwen2ForCausalLM", {}),
    "qwen2_moe": ("Qwen2MoeForCausalLM", {"mlp_only_layers": [0]}),
    "qwen3": ("Qwen3ForCausalLM", {}),
    "qwen3_moe": ("Qwen3MoeForCausalLM", {"mlp_only_layers": [0]}),
    "smollm3": ("SmolLM3ForCausalLM", {"layer_types": MIXED, "sliding_window": 8, "use_sliding_window": True}),
    "stablelm": ("StableLmForCausalLM", {}),
    "starcoder2": ("Starcoder2ForCausalLM", {}),
}

OLD_FALCON = {"new_decoder_architecture": False}
# Settings that lead to the branches left.
OTHERWISE = {"falcon": OLD_FALCON}

WINDOWS = {"max_window_layers", "use_sliding_window"}
# Fields that transformers' class works into others, and that its model code then leaves alone.
WORKED_IN = {
    "deepseek_v2": {"head_dim"},
    "phi3": {"original_max_position_embeddings"},
    "qwen2": WINDOWS,
    "qwen2_moe": WINDOWS,
    "qwen3": WINDOWS,
    "qwen3_moe": {"use_sliding_window"},
    "smollm3": {"no_rope_layer_interval"},
}
# Fields that one family's model code does not look at for logits, though another's may.
UNUSED = {
    "gemma3": {"boi_token_index", "eoi_token_index", "image_token_index", "mm_tokens_per_image", "vision_config"},
    "gemma3_text": {"attn_logit_softcapping"},
    "gpt2": {
        "reorder_and_upcast_attn",  # to float32, where scores are always summed here
        "summary_activation",
        "summary_first_dropout",
        "summary_proj_to_labels",
        "summary_type",
        "summary_use_proj",
    },
}


def raw(kind: str, **settings: Any) -> dict[str, Any]:
    name, options = CONFIGS[kind]
    sizes = {"gpt2": GPT2, "gemma3": {}}.get(kind, SIZES)
    return {"architectures": [name], "model_type": kind, **sizes, **options, **settings}


def test_every_architecture_is_here() -> None:
    assert {name: kind for kind, (name, _) in CONFIGS.items()} == {n: k for n, (k, _) in registry.FAMILIES.items()}


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_field_has_its_effect(kind: str) -> None:
    asked: set[str] = set()
    for content in (raw(kind), raw(kind, **OTHERWISE.get(kind, {}))):
        config = registry.as_config(content)
        registry.family_of(content).spec(config)
        asked |= config.asked
    config_class = CONFIG_MAPPING[kind]
    fields = {field.name for field in dataclasses.fields(config_class)}
    asked |= {config_class.attribute_map.get(name, name) for name in asked}
    excused = WORKED_IN.get(kind, set()) | UNUSED.get(kind, set())
    assert sorted(fields - asked - HARMLESS - excused) == []
    assert sorted(excused - fields) == []  # names that are gone
    assert sorted(excused & asked) == []


def test_harmless_names_are_sorted() -> None:
    lines = Path(harmless.__file__).read_text().splitlines()
    names = [line.strip() for line in lines if line.startswith("    ")]
    assert names == sorted(names)


REFUSED: list[tuple[str, Mapping[str, Any], str]] = [
    ("cohere", {"logit_scale": None}, "cohere"),
    ("cohere", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ("cohere2", {"layer_types": MIXED, "sliding_window": None}, "sliding_window"),
    ("cohere2", {"layer_types": ["full_attention"]}, "layer_types"),
    ("cohere2", {"position_embedding_type": "rope"}, "position_embedding_type"),
    ("cohere2", {"rotary_pct": 0.5}, "rotary_pct"),
    ("cohere2", {"use_gated_activation": False}, "use_gated_activation"),
    ("cohere2", {"use_parallel_block": False}, "use_parallel_block"),
    ("cohere2", {"use_qk_norm": True}, "use_qk_norm"),
    ("deepseek_v2", {"moe_layer_freq": 2}, "moe_layer_freq"),
    ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob"),
    ("deepseek_v2", {"num_key_value_heads": 2}, "num_key_value_heads"),
    ("deepseek_v2", {"scoring_func": "sigmoid"}, "scoring_func"),
    ("deepseek_v2", {"topk_method": "noaux_tc"}, "topk_method"),
    ("deepseek_v3", {"moe_layer_freq": 2}, "moe_layer_freq"),
    ("deepseek_v3", {"n_group": 256, "topk_group": 8}, "fewer than 2 experts each"),
    ("deepseek_v3", {"n_group": 3}, "256 experts are not a multiple of 3 groups"),
    ("deepseek_v3", {"num_experts_per_tok": 129}, "top_k 129, 128 of 256 experts eligible"),
    ("deepseek_v3", {"num_key_value_heads": 2}, "num_key_value_heads"),
    ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func"),
    ("deepseek_v3", {"topk_method": "greedy"}, "topk_method"),
    ("falcon", {"activation": "mish"}, "mish"),
    ("falcon", {"alibi": True}, "alibi"),
    ("falcon", {"apply_residual_connection_post_layernorm": True}, "apply_residual_connection_post_layernorm"),
    ("falcon", {"num_ln_in_parallel_attn": 3}, "num_ln_in_parallel_attn"),
    ("falcon", {"parallel_attn": False}, "parallel_attn"),
    ("falcon", {**OLD_FALCON, "multi_query": False, "num_kv_heads": 2}, "num_kv_heads"),
    ("falcon", {**OLD_FALCON, "num_ln_in_parallel_attn": 2}, "num_ln_in_parallel_attn"),
    ("gemma", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    ("gemma3", {"text_config": {**SIZES, "per_layer_config": {"0": {"head_dim": 32}}}}, "per_layer_config"),
    ("gemma3", {"text_config": {**SIZES, "use_bidirectional_attention": True}}, "use_bidirectional_attention"),
    ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    ("glm", {"partial_rotary_factor": 0.2}, "RoPE rotates 3 dims"),
    ("gpt2", {"add_cross_attention": True}, "add_cross_attention"),
    ("gpt2", {"n_inner": 0}, "width is 0"),
    ("gpt_neox", {"hidden_act": "mish"}, "mish"),
    ("gpt_oss", {"hidden_act": "gelu"}, "hidden_act"),
    ("gpt_oss", {"quantization_config": {"quant_method": "quark"}}, "quark"),
    ("gpt_oss", {"sliding_window": None}, "sliding_window"),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ("ministral", {"attention_bias": True}, "attention_bias"),
    ("ministral", {"layer_types": ["full_attention", "chunked_attention"]}, "chunked_attention"),
    ("mistral", {"attention_bias": True}, "attention_bias"),
    ("mistral", {"layer_types": MIXED}, "layer_types"),
    ("mistral", {"mlp_bias": True}, "mlp_bias"),
    ("mistral", {"sliding_window": 0}, "window is 0"),
    ("mixtral", {"hidden_act": "mish"}, "mish"),
    ("mixtral", {"layer_types": ["sliding_attention"] * 2}, "layer_types"),
    ("mixtral", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ("mixtral", {"rope_scaling": {"rope_type": "proportional", "factor": 2.0}}, "proportional"),
    ("opt", {"activation_function": "mish"}, "mish"),
    ("phi3", {"attention_bias": True}, "attention_bias"),
    ("phi3", {"lm_head_bias": True}, "lm_head_bias"),
    ("phi3", {"mlp_bias": True}, "mlp_bias"),
    ("qwen2", {"layer_types": ["full_attention", "chunked_attention"]}, "chunked_attention"),
    ("qwen2", {"layer_types": ["full_attention", "sliding_attention"]}, "sliding_window"),
    ("qwen2", {"rope_parameters": {"full_attention": {"rope_theta": 7.0}}}, "layer type"),
    ("qwen3", {"per_layer_config": {"0": {"head_dim": 32}}}, "per_layer_config"),
    ("qwen3_moe", {"layer_types": ["full_attention"] * 2}, "layer_types"),
    ("qwen3_moe", {"num_experts_per_tok": 129}, "top_k 129, 128 of 128 experts eligible"),
    ("smollm3", {"no_rope_layers": [1]}, "1 no_rope_layers for 2 layers"),
    ("smollm3", {"use_sliding_window": False}, "use_sliding_window"),
    ("starcoder2", {"mlp_type": "gated"}, "mlp_type"),
    ("starcoder2", {"norm_type": "rms_norm"}, "norm_type"),
]


@pytest.mark.parametrize(("kind", "settings", "names"), REFUSED)
def test_unsupported_options_are_rejected(kind: str, settings: Mapping[str, Any], names: str) -> None:
    with pytest.raises(CheckpointError, match=names):
        registry.spec_of(raw(kind, **settings))


def attention_of(spec: ModelSpec, layer: int) -> Attention:
    attention = spec.layers[layer].attention
    assert isinstance(attention, Attention)
    return attention


def test_windows_and_positions_of_each_layer() -> None:
    def seen(kind: str, **settings: Any) -> list[tuple[int | None, bool]]:
        spec = registry.spec_of(raw(kind, **settings))
        attentions = [attention_of(spec, i) for i in range(len(spec.layers))]
        return [(attention.window, attention.rope is not None) for attention in attentions]

    assert seen("ministral", layer_types=MIXED, sliding_window=8) == [(None, True), (8, True)]
    assert seen("ministral", sliding_window=None) == [(None, True)] * 2
    assert seen("mistral", sliding_window=8) == [(8, True)] * 2
    assert seen("cohere2", layer_types=MIXED, sliding_window=8) == [(None, False), (8, True)]
    assert seen("smollm3", no_rope_layers=[0, 1, 0]) == [(None, False), (8, True)]


def test_null_is_off() -> None:
    config = registry.as_config(raw("gemma", use_bidirectional_attention=None))
    config.refuse(use_bidirectional_attention=False)
    with pytest.raises(CheckpointError, match="use_bidirectional_attention = None"):
        config.refuse(use_bidirectional_attention=True)


@pytest.mark.parametrize("count", [10**12, 0, -1, "2", 2.0, None, [3]])
def test_absurd_numbers_of_layers_are_rejected_at_once(count: object) -> None:
    for kind in ("llama", "cohere2", "gpt2"):
        name = "n_layer" if kind == "gpt2" else "num_hidden_layers"
        with pytest.raises(CheckpointError, match=f"{name} = .*, expected 1 to 1000"):
            registry.spec_of(raw(kind, **{name: count}))
