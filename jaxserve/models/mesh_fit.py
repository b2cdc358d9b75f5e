# SPDX-License-Identifier: Apache-2.0
"""How a model's parameters and KV are sharded over the devices of a mesh. Plain arithmetic, without jax.

Dimensions that do not divide evenly are padded with zeros (vocabulary, MLP columns), repeated (KV heads), or rejected
(query heads, experts).
"""

import math
from dataclasses import dataclass

from jaxserve.errors import JaxserveError
from jaxserve.models.spec import Attention, LatentAttention, Layer, Mlp, ModelSpec, Recurrent

# For decode XLA splits the sum of a wide product over up to 16 programs that load 8 elements at a time. If the width
# does not divide by this, XLA pads a copy of the weight in every step.
WIDE, UNIT = 1024, 128


@dataclass(frozen=True)
class Fit:
    shards: int = 1  # of heads, vocabulary and MLP columns
    kv_repeat: int = 1  # how many times each KV head is stored
    unit: int = 1  # of MLP columns on each shard: quantized weights have values for groups of columns

    def rows(self, vocab_size: int) -> int:
        return _up(vocab_size, self.shards)

    def columns(self, width: int) -> int:
        return _up(width, self.shards * math.lcm(self.unit, UNIT if width >= WIDE else 1))

    def slots(self, layer: Layer) -> dict[str, tuple[int, ...]]:
        """The shape of one token's KV in each pool of a layer, over all devices."""
        attention = layer.attention
        if isinstance(attention, LatentAttention):
            return {"latent": (attention.kv_rank + attention.rope_dim,)}
        if isinstance(attention, Recurrent):
            return {}
        shape = (attention.kv_heads * self.kv_repeat, attention.head_dim)
        return {"k": shape, "v": shape}

    def slot_values(self, layer: Layer) -> int:
        """The number of values of a token's KV per layer and device: heads are sharded, the latent is not."""
        attention = layer.attention
        if isinstance(attention, LatentAttention):
            return attention.kv_rank + attention.rope_dim
        if isinstance(attention, Recurrent):
            return 0
        return 2 * attention.kv_heads * self.kv_repeat // self.shards * attention.head_dim

    def slot_heads(self, layer: Layer) -> int:
        """The number of a token's keys and values per layer and device, each of one head."""
        attention = layer.attention
        return 2 * attention.kv_heads * self.kv_repeat // self.shards if isinstance(attention, Attention) else 0


def _up(count: int, unit: int) -> int:
    return -(-count // unit) * unit


def fit(spec: ModelSpec, tensor: int = 1, experts: int = 1) -> Fit:
    """The Fit to a mesh with `tensor` shards of heads and `experts` shards of experts; see parallel.mesh.shards."""
    repeats = {1}
    for layer in spec.layers:
        attention = layer.attention
        if not isinstance(attention, Recurrent):
            _check_divides(attention.heads, tensor, "attention heads", "tensor")
        if isinstance(attention, Attention):
            if attention.kv_heads % tensor and tensor % attention.kv_heads:
                problem = f"{tensor} tensor shards do not divide among {attention.kv_heads} KV heads"
                raise JaxserveError(problem, f"use a tensor_parallel_size that is a multiple of {attention.kv_heads}")
            repeats.add(max(1, tensor // attention.kv_heads))
        if not isinstance(layer.mlp, Mlp):
            _check_divides(layer.mlp.router.experts, experts, "experts", "expert")
    if len(repeats - {1}) > 1:
        problem = f"layers differ in their number of KV heads, which do not all divide among {tensor} tensor shards"
        raise JaxserveError(problem, "use a smaller tensor_parallel_size")
    return Fit(tensor, max(repeats))


def _check_divides(count: int, shards: int, what: str, kind: str) -> None:
    if count % shards:
        problem = f"{count} {what} do not divide among {shards} {kind} shards"
        raise JaxserveError(problem, f"use a {kind}_parallel_size that divides {count}")
