# SPDX-License-Identifier: Apache-2.0
"""Every field of these families' configs is heeded, or harmless; what is not computed is refused by its name."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from convert import load
from jaxserve.errors import CheckpointError
from jaxserve.models import registry
from jaxserve.models.spec import Attention, ModelSpec
from tests.golden import load as golden
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
MIXED = ["full_attention", "sliding_attention"]

# Configs that go through every branch of their family's page.
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "cohere": ("CohereForCausalLM", {}),
    "cohere2": ("Cohere2ForCausalLM", {}),
    "falcon": ("FalconForCausalLM", {"new_decoder_architecture": True}),
    "glm": ("GlmForCausalLM", {"head_dim": 16}),
    "glm4": ("Glm4ForCausalLM", {"head_dim": 16}),
    "gpt2": ("GPT2LMHeadModel", {}),
    "gpt_neox": ("GPTNeoXForCausalLM", {}),
    "llama": ("LlamaForCausalLM", {}),
    "ministral": ("MinistralForCausalLM", {"head_dim": 16}),
    "mistral": ("MistralForCausalLM", {}),
    "opt": ("OPTForCausalLM", {}),
    "phi": ("PhiForCausalLM", {}),
    "phi3": ("Phi3ForCausalLM", {}),
    "smollm3": ("SmolLM3ForCausalLM", {"layer_types": MIXED, "sliding_window": 8, "use_sliding_window": True}),
    "stablelm": ("StableLmForCausalLM", {}),
    "starcoder2": ("Starcoder2ForCausalLM", {}),
}

OLD_FALCON = {"new_decoder_architecture": False}
# Settings that lead to the branches left.
OTHERWISE = {"falcon": OLD_FALCON}

# Fields that transformers' class works into others, and that its model code then leaves alone.
WORKED_IN = {
    "phi3": {"original_max_position_embeddings"},
    "smollm3": {"no_rope_layer_interval"},
}
# Fields that one family's model code does not look at for logits, though another's may.
UNUSED = {
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
    sizes = GPT2 if kind == "gpt2" else SIZES
    return {"architectures": [name], "model_type": kind, **sizes, **options, **settings}


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_field_is_heeded(kind: str) -> None:
    asked: set[str] = set()
    for content in (raw(kind), raw(kind, **OTHERWISE.get(kind, {}))):
        config = registry.as_config(content)
        registry.family_of(content).spec(config)
        asked |= config.asked
    config_class = CONFIG_MAPPING[kind]
    fields = {field.name for field in dataclasses.fields(config_class)}
    asked = {config_class.attribute_map.get(name, name) for name in asked}
    excused = WORKED_IN.get(kind, set()) | UNUSED.get(kind, set())
    assert sorted(fields - asked - HARMLESS - excused) == []
    assert sorted(excused - fields) == []  # names that are gone
    assert sorted(excused & asked) == []


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
    ("falcon", {"activation": "mish"}, "mish"),
    ("falcon", {"alibi": True}, "alibi"),
    ("falcon", {"apply_residual_connection_post_layernorm": True}, "apply_residual_connection_post_layernorm"),
    ("falcon", {"num_ln_in_parallel_attn": 3}, "num_ln_in_parallel_attn"),
    ("falcon", {"parallel_attn": False}, "parallel_attn"),
    ("falcon", {**OLD_FALCON, "multi_query": False, "num_kv_heads": 2}, "num_kv_heads"),
    ("falcon", {**OLD_FALCON, "num_ln_in_parallel_attn": 2}, "num_ln_in_parallel_attn"),
    ("glm", {"partial_rotary_factor": 0.2}, "RoPE turns 3 dims"),
    ("gpt2", {"add_cross_attention": True}, "add_cross_attention"),
    ("gpt2", {"n_inner": 0}, "width is 0"),
    ("gpt_neox", {"hidden_act": "mish"}, "mish"),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ("ministral", {"attention_bias": True}, "attention_bias"),
    ("ministral", {"layer_types": ["full_attention", "chunked_attention"]}, "chunked_attention"),
    ("mistral", {"attention_bias": True}, "attention_bias"),
    ("mistral", {"layer_types": MIXED}, "layer_types"),
    ("mistral", {"mlp_bias": True}, "mlp_bias"),
    ("mistral", {"sliding_window": 0}, "window is 0"),
    ("opt", {"activation_function": "mish"}, "mish"),
    ("phi3", {"attention_bias": True}, "attention_bias"),
    ("phi3", {"lm_head_bias": True}, "lm_head_bias"),
    ("phi3", {"mlp_bias": True}, "mlp_bias"),
    ("smollm3", {"no_rope_layers": [1]}, "1 no_rope_layers for 2 layers"),
    ("smollm3", {"use_sliding_window": False}, "use_sliding_window"),
    ("starcoder2", {"mlp_type": "gated"}, "mlp_type"),
    ("starcoder2", {"norm_type": "rms_norm"}, "norm_type"),
]


@pytest.mark.parametrize(("kind", "settings", "names"), REFUSED)
def test_what_is_not_computed_is_refused(kind: str, settings: Mapping[str, Any], names: str) -> None:
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


def written(case: str, folder: Path, rename: Callable[[str], str] = str) -> Path:
    read = golden.read(case)
    tensors = {rename(name): read.tensor(name) for name in read.tensors}
    return golden.write_folder(folder, read.config, tensors, dtype="float32", shards=1)


@pytest.mark.parametrize(("case", "prefix"), [("gpt2", "transformer."), ("opt", "model.")])
def test_names_without_their_prefix(case: str, prefix: str, tmp_path: Path) -> None:
    folders = (
        written(case, tmp_path / "with"),
        written(case, tmp_path / "without", lambda name: name.removeprefix(prefix)),
    )
    plans = [load.plan(folder, *registry.read_config(folder)) for folder in folders]
    assert plans[0].pieces.keys() == plans[1].pieces.keys()
    assert plans[0].bytes == plans[1].bytes


@pytest.mark.parametrize(
    ("case", "name", "expected"),
    [
        ("phi3", "model.layers.1.self_attn.qkv_proj.weight", r"\[127, 64\].*expected 128 outputs"),
        ("phi3", "model.layers.1.mlp.gate_up_proj.weight", r"\[191, 64\], of which \[95, 64\]"),
        ("gpt-neox-parallel", "gpt_neox.layers.1.attention.query_key_value.bias", r"\[191\].*expected 192 outputs"),
        ("falcon-new", "transformer.h.1.self_attention.query_key_value.weight", r"\[127, 64\].*expected 128 outputs"),
        ("gpt2", "transformer.h.1.attn.c_attn.bias", r"\[191\].*expected 192 outputs"),
    ],
)
def test_fused_weights_of_another_size(case: str, name: str, expected: str, tmp_path: Path) -> None:
    read = golden.read(case)
    tensors = {other: read.tensor(other) for other in read.tensors}
    tensors[name] = tensors[name][:-1]
    folder = golden.write_folder(tmp_path, read.config, tensors, dtype="float32", shards=1)
    with pytest.raises(CheckpointError, match=expected) as caught:
        load.plan(folder, *registry.read_config(folder))
    assert name in str(caught.value)


def test_a_head_without_its_norm(tmp_path: Path) -> None:
    read = golden.read("stablelm-qk-norm")
    lost = "model.layers.1.self_attn.k_layernorm.norms.1.weight"
    tensors = {name: read.tensor(name) for name in read.tensors if name != lost}
    folder = golden.write_folder(tmp_path, read.config, tensors, dtype="float32", shards=1)
    with pytest.raises(CheckpointError, match=r"norms\.1\.weight"):
        load.plan(folder, *registry.read_config(folder))


@pytest.mark.parametrize("count", [10**12, 0, -1, "2", 2.0, None, [3]])
def test_absurd_numbers_of_layers_are_refused_at_once(count: object) -> None:
    for kind in ("llama", "cohere2", "gpt2"):
        name = "n_layer" if kind == "gpt2" else "num_hidden_layers"
        with pytest.raises(CheckpointError, match=f"{name} = .*, expected 1 to 1000"):
            registry.spec_of(raw(kind, **{name: count}))
