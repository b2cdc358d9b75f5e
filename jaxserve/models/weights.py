# SPDX-License-Identifier: Apache-2.0
"""Rules that map the tensors of a Hugging Face checkpoint to public parameters. Data only: convert reads the files.

A family's WEIGHTS is a list of rules. `{layer}` and `{expert}` in a name stand for numbers; a public tensor whose rule
has `{expert}` in its source is the stack of all experts' tensors. If several rules name one public tensor, the first
whose source exists applies. A `view` selects or transposes part of the source without computing; the result is reshaped
to the public shape.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from jaxserve.models.spec import Attention, Layer

type View = Callable[[np.ndarray[Any, Any], Layer | None], np.ndarray[Any, Any]]


@dataclass(frozen=True)
class Rule:
    path: str
    source: str
    view: View | None = None

    @property
    def is_weight(self) -> bool:
        """Whether activations are multiplied by the tensor, which a checkpoint may therefore have quantized."""
        return self.path == "embed.weight" or self.path.rpartition(".")[2] in ("kernel", "head", "k_up", "v_up")


def linear(path: str, source: str, view: View | None = None) -> tuple[Rule, Rule]:
    """Kernel and bias of a linear layer."""
    return Rule(f"{path}.kernel", f"{source}.weight", view), Rule(f"{path}.bias", f"{source}.bias", view)


def norm(path: str, source: str) -> tuple[Rule, Rule]:
    return Rule(f"{path}.weight", f"{source}.weight"), Rule(f"{path}.bias", f"{source}.bias")


def renamed(rules: Sequence[Rule], prefixes: Mapping[str, str]) -> tuple[Rule, ...]:
    """The rules with source prefixes replaced; rules without these prefixes are unchanged."""

    def other(source: str) -> str:
        old = next((old for old in prefixes if source.startswith(old)), "")
        return prefixes[old] + source.removeprefix(old) if old else source

    return tuple(replace(rule, source=other(rule.source)) for rule in rules)


# --- views ----------------------------------------------------------------------------------------------------------


def transposed(array: np.ndarray[Any, Any], layer: Layer | None) -> np.ndarray[Any, Any]:
    """For kernels stored as [inputs, outputs]; a bias is unchanged."""
    return np.swapaxes(array, -1, -2) if array.ndim > 1 else array


def chained(*views: View) -> View:
    """The views applied in order."""

    def view(array: np.ndarray[Any, Any], layer: Layer | None) -> np.ndarray[Any, Any]:
        for one in views:
            array = one(array, layer)
        return array

    return view


def _check_outputs(array: np.ndarray[Any, Any], wanted: int) -> None:
    if array.shape[0] != wanted:
        raise ValueError(f"expected {wanted} outputs")


def half(part: int) -> View:
    """The first or second half of the rows."""

    def view(array: np.ndarray[Any, Any], layer: Layer | None) -> np.ndarray[Any, Any]:
        middle = array.shape[0] // 2
        return array[middle:] if part else array[:middle]

    return view


def grouped_qkv(part: str) -> View:
    """For rows grouped by KV head: its queries, then its key, then its value."""

    def view(array: np.ndarray[Any, Any], layer: Layer | None) -> np.ndarray[Any, Any]:
        assert layer is not None and isinstance(layer.attention, Attention)
        attention = layer.attention
        _check_outputs(array, (attention.heads + 2 * attention.kv_heads) * attention.head_dim)
        heads = array.reshape(attention.kv_heads, attention.group + 2, attention.head_dim, *array.shape[1:])
        at = {"q": slice(attention.group), "k": attention.group, "v": attention.group + 1}[part]
        return heads[:, at]

    return view


def stacked_qkv(part: str) -> View:
    """For rows ordered as all queries, then all keys, then all values."""

    def view(array: np.ndarray[Any, Any], layer: Layer | None) -> np.ndarray[Any, Any]:
        assert layer is not None and isinstance(layer.attention, Attention)
        attention = layer.attention
        q, kv = attention.heads * attention.head_dim, attention.kv_heads * attention.head_dim
        _check_outputs(array, q + 2 * kv)
        start, stop = {"q": (0, q), "k": (q, q + kv), "v": (q + kv, q + 2 * kv)}[part]
        return array[start:stop]

    return view


def qkv(path: str, source: str, view: Callable[[str], View]) -> tuple[Rule, ...]:
    """Queries, keys and values that the checkpoint stores in one tensor."""
    return tuple(rule for part in "qkv" for rule in linear(f"{path}.{part}", source, view(part)))


# --- names that most families share ---------------------------------------------------------------------------------

LAYER = "layers.{layer}"
HF_LAYER = "model.layers.{layer}"

LLAMA_LIKE: tuple[Rule, ...] = (
    Rule("embed.weight", "model.embed_tokens.weight"),
    Rule("head", "lm_head.weight"),
    Rule("head_bias", "lm_head.bias"),
    *norm("final_norm", "model.norm"),
    *norm(f"{LAYER}.attention_in", f"{HF_LAYER}.input_layernorm"),
    *norm(f"{LAYER}.mlp_in", f"{HF_LAYER}.post_attention_layernorm"),
    *linear(f"{LAYER}.attention.q", f"{HF_LAYER}.self_attn.q_proj"),
    *linear(f"{LAYER}.attention.k", f"{HF_LAYER}.self_attn.k_proj"),
    *linear(f"{LAYER}.attention.v", f"{HF_LAYER}.self_attn.v_proj"),
    *linear(f"{LAYER}.attention.out", f"{HF_LAYER}.self_attn.o_proj"),
    *norm(f"{LAYER}.attention.q_norm", f"{HF_LAYER}.self_attn.q_norm"),
    *norm(f"{LAYER}.attention.k_norm", f"{HF_LAYER}.self_attn.k_norm"),
    *linear(f"{LAYER}.mlp.gate", f"{HF_LAYER}.mlp.gate_proj"),
    *linear(f"{LAYER}.mlp.up", f"{HF_LAYER}.mlp.up_proj"),
    *linear(f"{LAYER}.mlp.down", f"{HF_LAYER}.mlp.down_proj"),
)

# Numbered experts under `mlp`, as in Qwen, DeepSeek and most others.
MOE_LIKE: tuple[Rule, ...] = (
    Rule(f"{LAYER}.mlp.router.kernel", f"{HF_LAYER}.mlp.gate.weight"),
    *linear(f"{LAYER}.mlp.experts.gate", f"{HF_LAYER}.mlp.experts.{{expert}}.gate_proj"),
    *linear(f"{LAYER}.mlp.experts.up", f"{HF_LAYER}.mlp.experts.{{expert}}.up_proj"),
    *linear(f"{LAYER}.mlp.experts.down", f"{HF_LAYER}.mlp.experts.{{expert}}.down_proj"),
    *linear(f"{LAYER}.mlp.shared.gate", f"{HF_LAYER}.mlp.shared_expert.gate_proj"),
    *linear(f"{LAYER}.mlp.shared.up", f"{HF_LAYER}.mlp.shared_expert.up_proj"),
    *linear(f"{LAYER}.mlp.shared.down", f"{HF_LAYER}.mlp.shared_expert.down_proj"),
    Rule(f"{LAYER}.mlp.shared_gate.kernel", f"{HF_LAYER}.mlp.shared_expert_gate.weight"),
)
