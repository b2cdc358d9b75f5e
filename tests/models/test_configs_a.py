# SPDX-License-Identifier: Apache-2.0
"""Every field of these families' configs is heeded, or harmless; what is not computed is refused by its name."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from convert import load
from jaxserve.errors import CheckpointError
from jaxserve.models import registry
from tests.golden import load as golden
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
}
DEEPSEEK = {"first_k_dense_replace": 1, "num_experts_per_tok": 2, "n_group": 4, "topk_group": 2}

# Configs that go through every branch of their family's page.
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "deepseek_v2": ("DeepseekV2ForCausalLM", {**DEEPSEEK, "topk_method": "group_limited_greedy"}),
    "deepseek_v3": ("DeepseekV3ForCausalLM", DEEPSEEK),
    "gemma": ("GemmaForCausalLM", {}),
    "gemma2": ("Gemma2ForCausalLM", {}),
    "gemma3": ("Gemma3ForConditionalGeneration", {"text_config": SIZES}),
    "gemma3_text": ("Gemma3ForCausalLM", {}),
    "gpt_oss": ("GptOssForCausalLM", {}),
    "granite": ("GraniteForCausalLM", {}),
    "llama": ("LlamaForCausalLM", {}),
    "mistral": ("MistralForCausalLM", {}),
    "mixtral": ("MixtralForCausalLM", {}),
    "olmo2": ("Olmo2ForCausalLM", {}),
    "qwen2": ("Qwen2ForCausalLM", {}),
    "qwen2_moe": ("Qwen2MoeForCausalLM", {"mlp_only_layers": [0]}),
    "qwen3": ("Qwen3ForCausalLM", {}),
    "qwen3_moe": ("Qwen3MoeForCausalLM", {"mlp_only_layers": [0]}),
}

WINDOWS = {"max_window_layers", "use_sliding_window"}
# Fields that transformers' class works into others, and that its model code then leaves alone.
WORKED_IN = {
    "deepseek_v2": {"head_dim"},
    "qwen2": WINDOWS,
    "qwen2_moe": WINDOWS,
    "qwen3": WINDOWS,
    "qwen3_moe": {"use_sliding_window"},
}
# Fields that one family's model code does not look at, though another's may.
UNUSED = {
    "gemma3": {"boi_token_index", "eoi_token_index", "image_token_index", "mm_tokens_per_image", "vision_config"},
    "gemma3_text": {"attn_logit_softcapping"},
}


def raw(kind: str, **settings: Any) -> dict[str, Any]:
    name, options = CONFIGS[kind]
    sizes = {} if kind == "gemma3" else SIZES
    return {"architectures": [name], "model_type": kind, **sizes, **options, **settings}


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_field_is_heeded(kind: str) -> None:
    content = raw(kind)
    config = registry.as_config(content)
    registry.family_of(content).spec(config)
    fields = {field.name for field in dataclasses.fields(CONFIG_MAPPING[kind])}
    known = HARMLESS | WORKED_IN.get(kind, set()) | UNUSED.get(kind, set())
    assert sorted(fields - config.asked - known) == []
    for excused in (WORKED_IN, UNUSED):
        assert sorted(excused.get(kind, set()) - fields) == []  # names that are gone
    assert sorted(UNUSED.get(kind, set()) & config.asked) == []


def test_harmless_names_are_sorted() -> None:
    lines = Path(harmless.__file__).read_text().splitlines()
    names = [line.strip() for line in lines if line.startswith("    ")]
    assert names == sorted(names)


REFUSED: list[tuple[str, Mapping[str, Any], str]] = [
    ("deepseek_v2", {"moe_layer_freq": 2}, "moe_layer_freq"),
    ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob"),
    ("deepseek_v2", {"num_key_value_heads": 2}, "num_key_value_heads"),
    ("deepseek_v2", {"scoring_func": "sigmoid"}, "scoring_func"),
    ("deepseek_v2", {"topk_method": "noaux_tc"}, "topk_method"),
    ("deepseek_v3", {"moe_layer_freq": 2}, "moe_layer_freq"),
    ("deepseek_v3", {"n_group": 3}, "256 experts in 3 groups"),
    ("deepseek_v3", {"n_group": 256, "topk_group": 8}, "no pairs"),
    ("deepseek_v3", {"num_experts_per_tok": 129}, "129 experts chosen of 128"),
    ("deepseek_v3", {"num_key_value_heads": 2}, "num_key_value_heads"),
    ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func"),
    ("deepseek_v3", {"topk_method": "greedy"}, "topk_method"),
    ("gemma", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    ("gemma3", {"text_config": {**SIZES, "use_bidirectional_attention": True}}, "use_bidirectional_attention"),
    ("gemma3", {"text_config": {**SIZES, "per_layer_config": {"0": {"head_dim": 32}}}}, "per_layer_config"),
    ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    ("gpt_oss", {"hidden_act": "gelu"}, "hidden_act"),
    ("gpt_oss", {"quantization_config": {"quant_method": "mxfp4"}}, "mxfp4"),
    ("gpt_oss", {"sliding_window": None}, "sliding_window"),
    ("mixtral", {"hidden_act": "mish"}, "mish"),
    ("mixtral", {"layer_types": ["sliding_attention"] * 2}, "layer_types"),
    ("mixtral", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ("mixtral", {"rope_scaling": {"rope_type": "proportional", "factor": 2.0}}, "proportional"),
    ("qwen2", {"layer_types": ["full_attention", "sliding_attention"]}, "sliding_window"),
    ("qwen2", {"layer_types": ["full_attention", "chunked_attention"]}, "chunked_attention"),
    ("qwen2", {"rope_parameters": {"full_attention": {"rope_theta": 7.0}}}, "layer type"),
    ("qwen3", {"per_layer_config": {"0": {"head_dim": 32}}}, "per_layer_config"),
    ("qwen3_moe", {"layer_types": ["full_attention"] * 2}, "layer_types"),
    ("qwen3_moe", {"num_experts_per_tok": 129}, "129 experts chosen of 128"),
]


@pytest.mark.parametrize(("kind", "settings", "names"), REFUSED)
def test_what_is_not_computed_is_refused(kind: str, settings: Mapping[str, Any], names: str) -> None:
    with pytest.raises(CheckpointError, match=names):
        registry.spec_of(raw(kind, **settings))


def test_null_is_off() -> None:
    config = registry.as_config(raw("gemma", use_bidirectional_attention=None))
    config.refuse(use_bidirectional_attention=False)
    with pytest.raises(CheckpointError, match="use_bidirectional_attention = None"):
        config.refuse(use_bidirectional_attention=True)


def test_gemma_3_goes_by_newer_names_too(tmp_path: Path) -> None:
    case = golden.read("gemma3-vision-hub")
    prefixes = {
        "language_model.model.": "model.language_model.",
        "vision_tower.": "model.vision_tower.",
        "multi_modal_projector.": "model.multi_modal_projector.",
    }
    renamed: dict[str, np.ndarray] = {}
    for name in case.tensors:
        [old] = [old for old in prefixes if name.startswith(old)]
        renamed[prefixes[old] + name.removeprefix(old)] = case.tensor(name)
    published, newer = tmp_path / "published", tmp_path / "newer"
    golden.write_checkpoint(case.case, published)
    golden.write_folder(newer, case.config, renamed, dtype="float32", shards=1)
    plans = [load.plan(folder, *registry.read_config(folder)) for folder in (published, newer)]
    assert plans[0].pieces.keys() == plans[1].pieces.keys()
    assert plans[0].bytes == plans[1].bytes
