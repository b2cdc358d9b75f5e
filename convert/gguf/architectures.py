# SPDX-License-Identifier: Apache-2.0
"""The architectures of GGUF files: their configs in Hugging Face's terms, and what differs in their tensors.

A page of facts, one function per family. Fields that a GGUF file lacks because all of llama.cpp's models of the family
agree in them are constants here.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from convert.gguf.fields import Fields
from convert.gguf.rope import parameters
from jaxserve.models.spec import MAX_LAYERS


@dataclass(frozen=True)
class Architecture:
    config: Callable[[Fields], dict[str, Any]]
    # Parts of tensors' names, in addition to names.LAYER or instead of them.
    names: Mapping[str, str] = field(default_factory=dict[str, str])
    interleaved: bool = False  # the rows of queries and keys are ordered for RoPE on neighbours
    offset: float = 0.0  # what was added to the weights of norms


def config_of(fields: Fields) -> dict[str, Any]:
    """The config.json that the file's pairs stand for."""
    if fields.architecture not in ARCHITECTURES:
        problem = f"the architecture {fields.architecture!r} is not supported"
        fields.fail(problem, f"supported: {', '.join(ARCHITECTURES)}")
    if (parts := fields.header.pairs.get("split.count", 1)) != 1:
        problem = f"is one of {parts} parts of a model"
        fields.fail(problem, "join them with `llama-gguf-split --merge`")
    return ARCHITECTURES[fields.architecture].config(fields)


# --- what most have in common ---------------------------------------------------------------------------------------


def _config(fields: Fields, name: str, model_type: str, **more: Any) -> dict[str, Any]:
    embedding = fields.tensor("token_embd.weight")
    if embedding is None:
        fields.fail("has no tensor 'token_embd.weight'", "name a file with a whole model")
    heads, layers = fields.count("attention.head_count"), fields.count("block_count")
    if not heads or not 0 < layers <= MAX_LAYERS:
        fields.fail(f"has {heads} attention heads and {layers} layers, expected some, and at most {MAX_LAYERS} layers")
    hidden = fields.count("embedding_length")
    head_dim = _head_dim(fields, hidden // heads)
    common: dict[str, Any] = {
        "architectures": [name],
        "model_type": model_type,
        "vocab_size": embedding.shape[0],
        "hidden_size": hidden,
        "intermediate_size": fields.count("feed_forward_length", 0),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": fields.count("attention.head_count_kv", heads),
        "max_position_embeddings": fields.count("context_length"),
        "hidden_act": "silu",
        "tie_word_embeddings": fields.tensor("output.weight") is None,
        "head_dim": head_dim,
        "rope_parameters": parameters(fields, head_dim=head_dim),
    }
    if fields.value("attention.layer_norm_rms_epsilon") is not None:
        common["rms_norm_eps"] = fields.real("attention.layer_norm_rms_epsilon")
    return common | more


def _head_dim(fields: Fields, default: int) -> int:
    found = fields.count("attention.key_length", default)
    if fields.count("attention.value_length", found) != found:
        fields.fail("has values of another length than keys, which is not supported", "use another model")
    return found


def _rotated(fields: Fields, config: dict[str, Any]) -> dict[str, Any]:
    """For families that may rotate only a part of each head."""
    dim, head_dim = fields.count("rope.dimension_count", config["head_dim"]), config["head_dim"]
    if dim != head_dim:
        config["rope_parameters"]["partial_rotary_factor"] = dim / max(head_dim, 1)
    return config


def _biases(fields: Fields) -> dict[str, bool]:
    names = {"attention_bias": "attn_q", "mlp_bias": "ffn_up"}
    return {key: fields.tensor(f"blk.0.{name}.bias") is not None for key, name in names.items()}


def _experts(fields: Fields) -> dict[str, Any]:
    return {
        "num_experts_per_tok": fields.count("expert_used_count"),
        "moe_intermediate_size": fields.count("expert_feed_forward_length", fields.count("feed_forward_length", 0)),
    }


# --- families -------------------------------------------------------------------------------------------------------


def _llama(fields: Fields) -> dict[str, Any]:
    experts = fields.count("expert_count", 0)
    if experts:
        used = fields.count("expert_used_count")
        more = dict(num_local_experts=experts, num_experts_per_tok=used, sliding_window=None)
        return _config(fields, "MixtralForCausalLM", "mixtral", **more)
    if window := fields.count("attention.sliding_window", 0):
        return _config(fields, "MistralForCausalLM", "mistral", sliding_window=window)
    return _config(fields, "LlamaForCausalLM", "llama", **_biases(fields))


def _qwen2(fields: Fields) -> dict[str, Any]:
    return _config(fields, "Qwen2ForCausalLM", "qwen2", use_sliding_window=False)


def _qwen2_moe(fields: Fields) -> dict[str, Any]:
    shared = fields.count("expert_shared_feed_forward_length", fields.count("feed_forward_length", 0))
    more = _experts(fields) | dict(num_experts=fields.count("expert_count"), shared_expert_intermediate_size=shared)
    more |= dict(norm_topk_prob=False, use_sliding_window=False, decoder_sparse_step=1, mlp_only_layers=[])
    more["qkv_bias"] = _biases(fields)["attention_bias"]
    return _config(fields, "Qwen2MoeForCausalLM", "qwen2_moe", **more)


def _qwen3(fields: Fields) -> dict[str, Any]:
    return _config(
        fields, "Qwen3ForCausalLM", "qwen3", use_sliding_window=False, attention_bias=_biases(fields)["attention_bias"]
    )


def _qwen3_moe(fields: Fields) -> dict[str, Any]:
    more = _experts(fields) | dict(num_experts=fields.count("expert_count"), attention_bias=False)
    more |= dict(norm_topk_prob=True, use_sliding_window=False, decoder_sparse_step=1, mlp_only_layers=[])
    return _config(fields, "Qwen3MoeForCausalLM", "qwen3_moe", **more)


def _gemma(fields: Fields) -> dict[str, Any]:
    more = dict(hidden_act="gelu_pytorch_tanh", hidden_activation="gelu_pytorch_tanh")
    return _config(fields, "GemmaForCausalLM", "gemma", **more)


def _gemma2(fields: Fields) -> dict[str, Any]:
    more: dict[str, Any] = dict(
        hidden_activation="gelu_pytorch_tanh",
        sliding_window=fields.count("attention.sliding_window", 4096),
        attn_logit_softcapping=fields.real("attn_logit_softcapping", 50.0),
        final_logit_softcapping=fields.real("final_logit_softcapping", 30.0),
    )
    return _scaled_queries(_config(fields, "Gemma2ForCausalLM", "gemma2", **more), large=46)


def _gemma3(fields: Fields) -> dict[str, Any]:
    window = fields.count("attention.sliding_window", 0)
    config = _config(fields, "Gemma3ForCausalLM", "gemma3_text", hidden_activation="gelu_pytorch_tanh")
    local = {"rope_type": "default", "rope_theta": fields.real("rope.freq_base_swa", 10_000.0)}
    config["rope_parameters"] = {"full_attention": config["rope_parameters"], "sliding_attention": local}
    slides = _slides(fields, config["num_hidden_layers"])
    config["layer_types"] = ["sliding_attention" if window and each else "full_attention" for each in slides]
    config["sliding_window"] = window or None
    config["final_logit_softcapping"] = fields.real("final_logit_softcapping", 0.0) or None
    return _scaled_queries(config, large=62)


def _slides(fields: Fields, layers: int) -> list[bool]:
    """Whether each layer has a sliding window: all but every sixth, unless the file says otherwise."""
    key = "attention.sliding_window_pattern"
    listed = fields.header.pairs.get(f"{fields.architecture}.{key}")
    if isinstance(listed, list):
        if len(listed) != layers:
            fields.fail(f"has {len(listed)} values in {key!r} for {layers} layers")
        return [bool(each) for each in listed]
    every = fields.count(key, 6) or 1
    return [(layer + 1) % every != 0 for layer in range(layers)]


def _scaled_queries(config: dict[str, Any], *, large: int) -> dict[str, Any]:
    """The file does not say what queries are scaled by: the model with so many layers differs from the others."""
    scalar = config["hidden_size"] // config["num_attention_heads"]
    config["query_pre_attn_scalar"] = scalar if config["num_hidden_layers"] == large else config["head_dim"]
    return config


def _phi3(fields: Fields) -> dict[str, Any]:
    config = _config(
        fields, "Phi3ForCausalLM", "phi3", sliding_window=fields.count("attention.sliding_window", 0) or None
    )
    original = fields.count("rope.scaling.original_context_length", config["max_position_embeddings"])
    return _rotated(fields, config | {"original_max_position_embeddings": original})


def _starcoder2(fields: Fields) -> dict[str, Any]:
    more: dict[str, Any] = dict(
        norm_epsilon=fields.real("attention.layer_norm_epsilon"),
        use_bias=fields.tensor("blk.0.attn_q.bias") is not None,
        hidden_act="gelu_pytorch_tanh",
        sliding_window=fields.count("attention.sliding_window", 0) or None,
    )
    return _config(fields, "Starcoder2ForCausalLM", "starcoder2", **more)


def _stablelm(fields: Fields) -> dict[str, Any]:
    more: dict[str, Any] = dict(
        layer_norm_eps=fields.real("attention.layer_norm_epsilon"),
        use_qkv_bias=fields.tensor("blk.0.attn_q.bias") is not None,
        use_parallel_residual=fields.tensor("blk.0.ffn_norm.weight") is None,
        qk_layernorm=fields.tensor("blk.0.attn_q_norm.weight") is not None,
    )
    config = _rotated(fields, _config(fields, "StableLmForCausalLM", "stablelm", **more))
    # transformers' default is to rotate a quarter of each head.
    config["rope_parameters"].setdefault("partial_rotary_factor", 1.0)
    return config


def _olmo2(fields: Fields) -> dict[str, Any]:
    if fields.count("attention.sliding_window", 0):
        fields.fail("has sliding windows (OLMo 3), which are not supported in this architecture", "use OLMo 2")
    return _config(fields, "Olmo2ForCausalLM", "olmo2", attention_bias=_biases(fields)["attention_bias"])


def _granite(fields: Fields) -> dict[str, Any]:
    config = _config(fields, "GraniteForCausalLM", "granite", **_biases(fields))
    return config | {
        "attention_multiplier": fields.real(
            "attention.scale", config["head_dim"] ** -0.5 if config["head_dim"] else 1.0
        ),
        "embedding_multiplier": fields.real("embedding_scale", 1.0),
        "residual_multiplier": fields.real("residual_scale", 1.0),
        "logits_scaling": fields.real("logit_scale", 1.0),
    }


def _smollm3(fields: Fields) -> dict[str, Any]:
    more: dict[str, Any] = dict(no_rope_layer_interval=4, use_sliding_window=False)
    return _config(fields, "SmolLM3ForCausalLM", "smollm3", **_biases(fields), **more)


_AROUND = {  # norms before and after attention and MLP
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_STABLE = {"attn_q_norm": "self_attn.q_layernorm.norms.{expert}", "attn_k_norm": "self_attn.k_layernorm.norms.{expert}"}

ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(_llama, interleaved=True),
    "qwen2": Architecture(_qwen2),
    "qwen2moe": Architecture(_qwen2_moe),
    "qwen3": Architecture(_qwen3),
    "qwen3moe": Architecture(_qwen3_moe),
    "gemma": Architecture(_gemma, offset=1.0),
    "gemma2": Architecture(_gemma2, _AROUND, offset=1.0),
    "gemma3": Architecture(_gemma3, _AROUND, offset=1.0),
    "granite": Architecture(_granite, interleaved=True),
    "olmo2": Architecture(_olmo2, _AROUND),
    "phi3": Architecture(_phi3, {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"}),
    "smollm3": Architecture(_smollm3, interleaved=True),
    "stablelm": Architecture(_stablelm, _STABLE),
    "starcoder2": Architecture(_starcoder2, {"ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"}),
}
