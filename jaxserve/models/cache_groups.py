# SPDX-License-Identifier: Apache-2.0
"""Cache groups: which layers of a model keep the KV of the same tokens. Plain arithmetic, without jax.

Layers that attend to all tokens keep all of them; layers with a sliding window keep only their window. Each group has
its own block table. All groups take their blocks from one pool, so that memory goes to whichever group needs it, for
short sequences as for long ones. So all groups have equally many layers: a block holds `block_size` tokens of `places`
layers, and a group's layer p keeps its KV at place p of the group's blocks. If a kind of layers does not fill its last
group, some of its places stay empty; `groups_of` chooses the size of groups that takes the least memory.
"""

from collections import defaultdict
from dataclasses import dataclass
from functools import cache
from itertools import count

from jaxserve.models.mesh_fit import Fit
from jaxserve.models.spec import Attention, Layer, ModelSpec

MOST = 16  # groups; each has a block table to edit
PER_GROUP = 0.01  # what another group costs, as a share of the memory: its table is edited and read in each step


@dataclass(frozen=True)
class Groups:
    windows: tuple[int | None, ...]  # of each group: how many tokens its layers attend to; None: all
    at: tuple[tuple[int, int], ...]  # of each layer: its group, and its place in the group's blocks

    @property
    def places(self) -> int:
        """The layers of a group, whose KV one block holds."""
        return 1 + max(place for _, place in self.at)

    def layers(self) -> tuple[int, ...]:
        """For each place a layer that keeps its KV there. All others at this place have KV of the same shape."""
        first: dict[int, int] = {}
        for layer, (_, place) in enumerate(self.at):
            first.setdefault(place, layer)
        return tuple(first[place] for place in range(self.places))


def one_group(spec: ModelSpec, window: int | None = None) -> Groups:
    """All layers in one group."""
    return Groups((window,), tuple((0, layer) for layer in range(len(spec.layers))))


@cache
def groups_of(spec: ModelSpec, length: int) -> Groups:
    """The groups for sequences of up to `length` tokens: a window that they do not exceed saves nothing."""
    kinds: dict[int | None, list[int]] = defaultdict(list)  # layers by window
    for i, layer in enumerate(spec.layers):
        window = _window(layer)
        kinds[window if window is not None and window < length else None].append(i)
    if len(kinds) == 1:
        return one_group(spec, next(iter(kinds)))
    if len({tuple(Fit().slots(layer).items()) for layer in spec.layers}) > 1:  # one block cannot hold either
        return one_group(spec, None if None in kinds else max(window for window in kinds if window is not None))
    order = sorted(kinds, key=lambda window: (window is not None, window or 0))  # layers that keep all tokens first

    def cost(size: int) -> float:
        numbers = {window: -(-len(kinds[window]) // size) for window in order}
        if sum(numbers.values()) > MOST:
            return float("inf")
        tokens = sum(number * size * min(length, window or length) for window, number in numbers.items())
        return tokens * (1 + PER_GROUP * sum(numbers.values()))

    # The largest size puts each kind into one group; MOST allows that, as models have two kinds.
    size = min(range(1, 1 + max(map(len, kinds.values()))), key=cost)
    windows: list[int | None] = []
    at: dict[int, tuple[int, int]] = {}
    for window in order:
        numbered = zip(count(len(windows) * size), kinds[window], strict=False)
        at |= {layer: divmod(place, size) for place, layer in numbered}
        windows += [window] * -(-len(kinds[window]) // size)
    return Groups(tuple(windows), tuple(at[layer] for layer in range(len(spec.layers))))


def _window(layer: Layer) -> int | None:
    return layer.attention.window if isinstance(layer.attention, Attention) else None
