# SPDX-License-Identifier: Apache-2.0
"""gpt-oss: experts with biases, sliding windows on some layers, attention sinks on all. bfloat16 only, not MXFP4."""

from typing import Any

import numpy as np

from jaxserve.models import hf
from jaxserve.models.spec import ClampedSwiglu, Layer, ModelSpec, Moe, Router
from jaxserve.models.weights import HF_LAYER, LAYER, LLAMA_LIKE, Rule, View, linear, transposed


def _every_other(first: int, *, kernel: bool) -> View:
    """Gate and up alternate along the last axis; kernels are stored as [inputs, outputs]."""

    def view(array: np.ndarray[Any, Any], layer: Layer | None) -> np.ndarray[Any, Any]:
        part = array[..., first::2]
        return np.swapaxes(part, -1, -2) if kernel else part

    return view


_EXPERTS, _FUSED = f"{LAYER}.mlp.experts", f"{HF_LAYER}.mlp.experts.gate_up_proj"

WEIGHTS = (
    *LLAMA_LIKE,
    Rule(f"{LAYER}.attention.sinks", f"{HF_LAYER}.self_attn.sinks"),
    *linear(f"{LAYER}.mlp.router", f"{HF_LAYER}.mlp.router"),
    *(Rule(f"{_EXPERTS}.{part}.kernel", _FUSED, _every_other(i, kernel=True)) for i, part in enumerate(("gate", "up"))),
    *(
        Rule(f"{_EXPERTS}.{part}.bias", f"{_FUSED}_bias", _every_other(i, kernel=False))
        for i, part in enumerate(("gate", "up"))
    ),
    Rule(f"{_EXPERTS}.down.kernel", f"{HF_LAYER}.mlp.experts.down_proj", transposed),
    Rule(f"{_EXPERTS}.down_bias", f"{HF_LAYER}.mlp.experts.down_proj_bias"),
)


def spec(config: hf.Config) -> ModelSpec:
    config.refuse(hidden_act="silu")
    norm, bias = hf.rms(config), config.attention_bias
    moe = Moe(
        router=Router(
            experts=config.num_local_experts, top_k=config.num_experts_per_tok, scoring="softmax_of_chosen", bias=True
        ),
        width=config.intermediate_size,
        activation=ClampedSwiglu(alpha=float(config.swiglu_alpha), limit=float(config.swiglu_limit)),
        bias=True,
    )
    layers = tuple(
        Layer(
            attention=hf.attention(config, window=window, sinks=True, qkv_bias=bias, out_bias=bias),
            mlp=moe,
            attention_in=norm,
            mlp_in=norm,
        )
        for window in hf.windows(config)
    )
    return hf.model(config, layers=layers, final_norm=norm)
