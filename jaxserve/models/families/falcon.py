# SPDX-License-Identifier: Apache-2.0
"""Falcon: the architecture of 40B and 11B (new_decoder_architecture), and that of 7B."""

from jaxserve.models import hf
from jaxserve.models.spec import Layer, ModelSpec
from jaxserve.models.weights import LAYER, Rule, grouped_qkv, linear, norm, qkv

_IN = "transformer.h.{layer}"
WEIGHTS = (
    Rule("embed.weight", "transformer.word_embeddings.weight"),
    Rule("head", "lm_head.weight"),
    *norm("final_norm", "transformer.ln_f"),
    *norm(f"{LAYER}.attention_in", f"{_IN}.input_layernorm"),
    *norm(f"{LAYER}.attention_in", f"{_IN}.ln_attn"),
    *norm(f"{LAYER}.mlp_in", f"{_IN}.post_attention_layernorm"),
    *norm(f"{LAYER}.mlp_in", f"{_IN}.ln_mlp"),
    *qkv(f"{LAYER}.attention", f"{_IN}.self_attention.query_key_value", grouped_qkv),
    *linear(f"{LAYER}.attention.out", f"{_IN}.self_attention.dense"),
    *linear(f"{LAYER}.mlp.up", f"{_IN}.mlp.dense_h_to_4h"),
    *linear(f"{LAYER}.mlp.down", f"{_IN}.mlp.dense_4h_to_h"),
)


def spec(config: hf.Config) -> ModelSpec:
    config.refuse(alibi=False, apply_residual_connection_post_layernorm=False)
    norm, bias = hf.layer_norm(config.layer_norm_epsilon), bool(config.bias)
    parallel = bool(config.parallel_attn)
    layer = Layer(
        attention=hf.attention(config, kv_heads=_kv_heads(config), qkv_bias=bias, out_bias=bias),
        mlp=hf.mlp(
            config,
            width=config.ffn_hidden_size,
            activation=hf.activation(config.activation),
            gated=False,
            bias=bias,
            down_bias=bias,
        ),
        attention_in=norm,
        mlp_in=norm if _two_norms(config) else None,
        parallel=parallel,
    )
    return hf.model(config, layers=(layer,) * config.num_hidden_layers, final_norm=norm)


def _kv_heads(config: hf.Config) -> int:
    if config.new_decoder_architecture:
        return config.num_kv_heads
    if config.multi_query:
        return 1
    config.refuse("without multi_query", num_kv_heads=config.num_attention_heads)
    return config.num_attention_heads


def _two_norms(config: hf.Config) -> bool:
    """Raise for configs that transformers itself cannot run."""
    norms = config.num_ln_in_parallel_attn
    if not config.new_decoder_architecture:
        if config.parallel_attn and norms == 2:
            config.refuse("without new_decoder_architecture", num_ln_in_parallel_attn=1)
        return not config.parallel_attn
    config.refuse("with new_decoder_architecture", parallel_attn=True)
    if norms not in (None, 1):
        config.refuse(num_ln_in_parallel_attn=2)
    return norms != 1
