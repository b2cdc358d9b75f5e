# SPDX-License-Identifier: Apache-2.0
"""Cache groups: which layers of a model keep the KV of the same tokens. Plain arithmetic, without jax.

Layers that attend to all tokens keep all of them; layers with a sliding window keep only their window. Each group has
its own block table. All groups take their blocks from one pool, so that memory goes to whichever group needs it, for
short sequences as for long ones. So all groups have equally many layers: a block holds `block_size` tokens of `places`
layers, and a group's layer p keeps its KV at place p of the group's blocks. If a kind of layers does not fill its last
group, some of its places stay empty; `groups_of` chooses the size of groups that takes the least memory.

Recurrent layers are in no group: they keep a state for each row, and no KV. Their arrays follow those of the places.
"""

from collections import defaultdict
from dataclasses import dataclass
from functools import cache
from itertools import count

from jaxserve.models.mesh_fit import Fit
from jaxserve.models.spec import Attention, Layer, ModelSpec, Recurrent

STATE = -1  # stands for the group of layers that keep a state for each row
MOST = 16  # groups; each has a block table to edit
PER_GROUP = 0.01  # what another group costs, as a share of the memory: its table is edited and read in each step


@dataclass(frozen=True)
class Groups:
    windows: tuple[int | None, ...]  # of each group: how many tokens its layers attend to; None: all
    # Of each layer: its group, or STATE, and the index of its arrays in the cache: its place in the group's blocks.
    at: tuple[tuple[int, int], ...]

    @property
    def places(self) -> int:
        """The layers of a group, whose KV one block holds."""
        return 1 + max(place for group, place in self.at if group != STATE)

    @property
    def states(self) -> bool:
        """Whether layers keep a state for each row."""
        return any(group == STATE for group, _ in self.at)

    def layers(self) -> tuple[int, ...]:
        """For each entry of the cache a layer that uses it. All others that do have KV of the same shape."""
        first: dict[int, int] = {}
        for layer, (_, place) in enumerate(self.at):
            first.setdefault(place, layer)
        return tuple(first[place] for place in sorted(first))


def one_group(spec: ModelSpec, window: int | None = None) -> Groups:
    """All layers with KV in one group."""
    recurrent = _recurrent(spec)
    paged = [layer for layer in range(len(spec.layers)) if layer not in recurrent]
    return _with_states(spec, (window,), {layer: (0, place) for place, layer in enumerate(paged)})


@cache
def groups_of(spec: ModelSpec, length: int) -> Groups:
    """The groups for sequences of up to `length` tokens: a window that they do not exceed saves nothing."""
    kinds: dict[int | None, list[int]] = defaultdict(list)  # layers by window
    for i, layer in enumerate(spec.layers):
        if isinstance(layer.attention, Recurrent):
            continue
        window = _window(layer)
        kinds[window if window is not None and window < length else None].append(i)
    if len(kinds) == 1:
        return one_group(spec, next(iter(kinds)))
    paged = [spec.layers[layer] for layers in kinds.values() for layer in layers]
    if len({tuple(Fit().slots(layer).items()) for layer in paged}) > 1:  # one block cannot hold either
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
    return _with_states(spec, tuple(windows), at)


def _with_states(spec: ModelSpec, windows: tuple[int | None, ...], at: dict[int, tuple[int, int]]) -> Groups:
    places = 1 + max(place for _, place in at.values())
    states = {layer: (STATE, places + i) for i, layer in enumerate(_recurrent(spec))}
    return Groups(windows, tuple((at | states)[layer] for layer in range(len(spec.layers))))


def _recurrent(spec: ModelSpec) -> list[int]:
    return [i for i, layer in enumerate(spec.layers) if isinstance(layer.attention, Recurrent)]


def _window(layer: Layer) -> int | None:
    return layer.attention.window if isinstance(layer.attention, Attention) else None
