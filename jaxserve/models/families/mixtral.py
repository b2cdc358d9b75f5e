# SPDX-License-Identifier: Apache-2.0
"""Mixtral: Mistral with experts."""

from jaxserve.models import hf
from jaxserve.models.spec import Layer, ModelSpec, Moe, Router
from jaxserve.models.weights import HF_LAYER, LAYER, LLAMA_LIKE, Rule, linear

_MOE = f"{HF_LAYER}.block_sparse_moe"

WEIGHTS = (
    *LLAMA_LIKE,
    Rule(f"{LAYER}.mlp.router.kernel", f"{_MOE}.gate.weight"),
    *linear(f"{LAYER}.mlp.experts.gate", f"{_MOE}.experts.{{expert}}.w1"),
    *linear(f"{LAYER}.mlp.experts.up", f"{_MOE}.experts.{{expert}}.w3"),
    *linear(f"{LAYER}.mlp.experts.down", f"{_MOE}.experts.{{expert}}.w2"),
)


def spec(config: hf.Config) -> ModelSpec:
    config.refuse(layer_types=None)
    norm = hf.rms(config)
    router = Router(
        experts=config.num_local_experts, top_k=config.num_experts_per_tok, scoring="softmax", normalize=True
    )
    layer = Layer(
        attention=hf.attention(config, window=config.sliding_window),
        mlp=Moe(router=router, width=config.intermediate_size, activation=hf.activation(config.hidden_act)),
        attention_in=norm,
        mlp_in=norm,
    )
    return hf.model(config, layers=(layer,) * config.num_hidden_layers, final_norm=norm)
