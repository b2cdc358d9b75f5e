# SPDX-License-Identifier: Apache-2.0
"""Cache groups of specs like those of published models: sizes, places, and the memory that they save."""

from collections import Counter
from dataclasses import replace

import pytest

from jaxserve.models.cache_groups import groups_of
from jaxserve.models.mesh_fit import Fit
from jaxserve.models.spec import Attention, ModelSpec
from tests.models import tiny


def layers(pattern: str, *, window: int = 1024, kv_heads: int = 2) -> ModelSpec:
    """`F` sees everything, `w` a window."""
    kinds = {
        "F": tiny.block(tiny.grouped(kv_heads=kv_heads), tiny.MLP),
        "w": tiny.block(tiny.grouped(kv_heads=kv_heads, window=window), tiny.MLP),
    }
    return replace(tiny.model(kinds["F"]), max_positions=2**17, layers=tuple(kinds[kind] for kind in pattern))


GEMMA3_27B = ("wwwwwF" * 11)[:62]


@pytest.mark.parametrize(
    ("pattern", "groups", "places"),
    [
        ("F" * 5, 1, 5),
        ("w" * 5, 1, 5),
        ("wF" * 23, 2, 23),  # Gemma 2 27B
        ("wF" * 18, 2, 18),  # gpt-oss 120B
        ("wwwF" * 8, 4, 8),  # Command R7B
        ("wwwwwF" * 8, 6, 8),  # Gemma 3 12B
        (GEMMA3_27B, 7, 10),  # 52 layers with a window, 10 without: 8 places are empty
    ],
)
def test_layers_of_one_kind_share_groups_of_equal_size(pattern: str, groups: int, places: int) -> None:
    spec = layers(pattern)
    found = groups_of(spec, 32768)
    assert (len(found.windows), found.places) == (groups, places)
    assert len(set(found.at)) == len(spec.layers), "two layers at one place of one group"
    sizes = Counter(group for group, _ in found.at)
    assert all(
        sorted(place for group, place in found.at if group == each) == list(range(n)) for each, n in sizes.items()
    )
    for layer, (group, _) in zip(spec.layers, found.at, strict=True):
        assert isinstance(layer.attention, Attention) and layer.attention.window == found.windows[group]


def test_a_window_that_no_sequence_exceeds_makes_no_group() -> None:
    assert groups_of(layers("wF", window=1024), 1024).windows == (None,)
    assert groups_of(layers("wF", window=1024), 1025).windows == (None, 1024)
    assert groups_of(layers("ww", window=1024), 512).windows == (None,)


def test_layers_whose_kv_differs_in_shape_share_one_group_that_keeps_everything() -> None:
    wide, narrow = layers("F", kv_heads=4), layers("w", kv_heads=2)
    spec = replace(wide, layers=wide.layers + narrow.layers)
    found = groups_of(spec, 32768)
    assert found.windows == (None,) and found.at == ((0, 0), (0, 1))


def test_each_place_has_one_shape() -> None:
    spec = layers("wwFwwwF")
    found = groups_of(spec, 32768)
    shapes = [Fit().slots(spec.layers[layer]) for layer in found.layers()]
    for layer, (_, place) in zip(spec.layers, found.at, strict=True):
        assert Fit().slots(layer) == shapes[place]
