# SPDX-License-Identifier: Apache-2.0
"""OPT: learned positions that start at row 2; pre-norm, or (350m) post-norm."""

from jaxserve.models import hf
from jaxserve.models.spec import Layer, ModelSpec
from jaxserve.models.weights import LAYER, Rule, linear, norm, renamed

_IN = "model.decoder.layers.{layer}"
_NAMES = (
    Rule("embed.weight", "model.decoder.embed_tokens.weight"),
    Rule("positions.weight", "model.decoder.embed_positions.weight"),
    Rule("head", "lm_head.weight"),
    *linear("embed_in", "model.decoder.project_in"),
    *linear("embed_out", "model.decoder.project_out"),
    *norm("final_norm", "model.decoder.final_layer_norm"),
    *norm(f"{LAYER}.attention_in", f"{_IN}.self_attn_layer_norm"),
    *norm(f"{LAYER}.attention_out", f"{_IN}.self_attn_layer_norm"),
    *norm(f"{LAYER}.mlp_in", f"{_IN}.final_layer_norm"),
    *norm(f"{LAYER}.mlp_out", f"{_IN}.final_layer_norm"),
    *linear(f"{LAYER}.attention.q", f"{_IN}.self_attn.q_proj"),
    *linear(f"{LAYER}.attention.k", f"{_IN}.self_attn.k_proj"),
    *linear(f"{LAYER}.attention.v", f"{_IN}.self_attn.v_proj"),
    *linear(f"{LAYER}.attention.out", f"{_IN}.self_attn.out_proj"),
    *linear(f"{LAYER}.mlp.up", f"{_IN}.fc1"),
    *linear(f"{LAYER}.mlp.down", f"{_IN}.fc2"),
)
WEIGHTS = (*_NAMES, *renamed(_NAMES, {"model.decoder.": "decoder."}))
_OFFSET = 2


def spec(config: hf.Config) -> ModelSpec:
    heads, bias, affine = config.num_attention_heads, config.enable_bias, config.layer_norm_elementwise_affine
    norm = hf.layer_norm(1e-5, bias=affine, weight=affine)
    before = config.do_layer_norm_before
    ahead, behind = (norm, None) if before else (None, norm)
    layer = Layer(
        attention=hf.attention(
            config,
            head_dim=config.hidden_size // heads,
            kv_heads=heads,
            rope=None,
            qkv_bias=bias,
            out_bias=bias,
        ),
        mlp=hf.mlp(
            config,
            width=config.ffn_dim,
            activation=hf.activation(config.activation_function),
            gated=False,
            bias=bias,
            down_bias=bias,
        ),
        attention_in=ahead,
        attention_out=behind,
        mlp_in=ahead,
        mlp_out=behind,
        norm_the_sum=not before,
    )
    narrow = config.word_embed_proj_dim
    return hf.model(
        config,
        layers=(layer,) * config.num_hidden_layers,
        final_norm=norm if before and not config._remove_final_layer_norm else None,
        embed_dim=None if narrow == config.hidden_size else narrow,
        learned_positions=config.max_position_embeddings + _OFFSET,
        position_offset=_OFFSET,
    )
