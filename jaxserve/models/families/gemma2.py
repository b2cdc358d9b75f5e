# SPDX-License-Identifier: Apache-2.0
"""Gemma 2 and 3. Of multimodal models only the text part runs."""

import math

from jaxserve.models import hf
from jaxserve.models.spec import Layer, ModelSpec
from jaxserve.models.weights import HF_LAYER, LAYER, LLAMA_LIKE, norm, renamed

_TEXT = (
    # Must come first: LLAMA_LIKE uses the name post_attention_layernorm for another norm.
    *norm(f"{LAYER}.mlp_in", f"{HF_LAYER}.pre_feedforward_layernorm"),
    *norm(f"{LAYER}.attention_out", f"{HF_LAYER}.post_attention_layernorm"),
    *norm(f"{LAYER}.mlp_out", f"{HF_LAYER}.post_feedforward_layernorm"),
    *(rule for rule in LLAMA_LIKE if ".mlp_in." not in rule.path),
)
WEIGHTS = (
    *_TEXT,
    *renamed(_TEXT, {"model.": "language_model.model.", "lm_head.": "language_model.lm_head."}),
    *renamed(_TEXT, {"model.": "model.language_model."}),
)
IGNORED = (r"^(model\.)?(vision_tower|multi_modal_projector)\.",)


def spec(config: hf.Config) -> ModelSpec:
    tied = config.tie_word_embeddings
    if config.model_type == "gemma3":
        config = hf.Config(config.text_config)
        config.refuse(model_type="gemma3_text")
    config.refuse(use_bidirectional_attention=False)
    third, norm, bias = config.model_type == "gemma3_text", hf.rms(config, offset=1.0), config.attention_bias

    def layer(kind: str, window: int | None) -> Layer:
        return Layer(
            attention=hf.attention(
                config,
                scale=config.query_pre_attn_scalar**-0.5,
                rope=hf.rope(config, config.head_dim, kind=kind if third else None),
                window=window,
                # Gemma 3's config has the field too, but its attention ignores it.
                soft_cap=None if third else config.attn_logit_softcapping,
                qkv_bias=bias,
                out_bias=bias,
                qk_norm=norm if third else None,
            ),
            mlp=hf.mlp(config, activation=hf.activation(config.hidden_activation)),
            attention_in=norm,
            attention_out=norm,
            mlp_in=norm,
            mlp_out=norm,
        )

    return hf.model(
        config,
        layers=tuple(map(layer, config.layer_types, hf.windows(config))),
        final_norm=norm,
        tied=tied,
        embed_scale=math.sqrt(config.hidden_size),
        logit_soft_cap=config.final_logit_softcapping,
    )
