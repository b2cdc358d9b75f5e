# SPDX-License-Identifier: Apache-2.0
"""How a model's parameters and cache are fitted to a mesh: what does not divide is padded with zeros (vocabulary,
MLP columns), repeated (KV heads), or refused with the numbers (query heads, experts).
"""

from dataclasses import dataclass

from jaxserve.errors import JaxserveError
from jaxserve.models.spec import Attention, Mlp, ModelSpec
from jaxserve.parallel import mesh

# XLA splits the sum of a wide product for decode over up to 16 programs that load 8 elements at a time, and copies
# a weight to pad it, in every step, where that does not divide.
WIDE, UNIT = 1024, 128


@dataclass(frozen=True)
class Fit:
    shards: int = 1
    kv_repeat: int = 1  # how many times each KV head is stored

    def rows(self, vocab_size: int) -> int:
        return _up(vocab_size, self.shards)

    def columns(self, width: int) -> int:
        return _up(width, self.shards * (UNIT if width >= WIDE else 1))


def _up(count: int, unit: int) -> int:
    return -(-count // unit) * unit


def fit(spec: ModelSpec) -> Fit:
    """For the mesh in context."""
    mesh.check_explicit()
    tensor, experts = mesh.axis_size("heads"), mesh.axis_size("experts")
    repeats = {1}
    for layer in spec.layers:
        attention = layer.attention
        _need(attention.heads, tensor, "attention heads", "tensor shards")
        if isinstance(attention, Attention):
            if attention.kv_heads % tensor:
                _need(tensor, attention.kv_heads, "tensor shards", "KV heads")
            repeats.add(max(1, tensor // attention.kv_heads))
        if not isinstance(layer.mlp, Mlp):
            _need(layer.mlp.router.experts, experts, "experts", "expert shards")
    if len(repeats - {1}) > 1:
        raise JaxserveError(f"layers differ in KV heads: {tensor} tensor shards do not fit", "use fewer shards")
    return Fit(tensor, max(repeats))


def _need(count: int, parts: int, what: str, of: str) -> None:
    if count % parts:
        raise JaxserveError(f"{count} {what} do not divide among {parts} {of}", "choose another number of shards")
