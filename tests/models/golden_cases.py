# SPDX-License-Identifier: Apache-2.0
"""Which golden cases go which way: all through the dense model, one of each architecture also through the whole engine,
and through the decoder's step alone what asks of paged attention what none of these does."""

from functools import cache

from jaxserve.models import registry
from jaxserve.models.spec import Attention, LatentAttention
from tests.golden import load as golden

TOLERANCE = 2e-4  # of the logits' spread

# Here transformers computes the whole text anew when it becomes long: each token has the RoPE length of what is before
# it. A request keeps to one length for its life.
CROSSING = ("phi3-longrope-crossing",)


def _asked(case: str) -> tuple[object, ...]:
    """What a case asks of attention, within which alone the dense and the paged way differ."""
    spec = registry.spec_of(golden.config(case))
    kinds = frozenset(
        (attention.window is not None, attention.soft_cap is not None, attention.sinks, attention.group > 1)
        if isinstance(attention := layer.attention, Attention)
        else (type(attention).__name__, isinstance(attention, LatentAttention) and attention.q_rank is None)
        for layer in spec.layers
    )
    return spec.needs_rope_length, spec.learned_positions is None, kinds


@cache
def _candidates() -> tuple[str, ...]:
    """One case for all of a family that ask the same: the one of fewest layers, which compiles fastest."""
    chosen: dict[object, tuple[int, str]] = {}
    for case in golden.cases():
        if case not in CROSSING:
            spec = registry.spec_of(golden.config(case))
            key = (spec.family, *_asked(case))
            chosen[key] = min((len(spec.layers), case), chosen.get(key, (1000, "")))
    return tuple(sorted(case for _, case in chosen.values()))


@cache
def engine_cases() -> tuple[str, ...]:
    """One of each architecture, and of each that has a RoPE which depends on the sequence's length."""
    chosen: dict[tuple[str, bool], str] = {}
    for case in _candidates():
        config = golden.config(case)
        chosen.setdefault((config["architectures"][0], registry.spec_of(config).needs_rope_length), case)
    return tuple(sorted(chosen.values()))


@cache
def paged_cases() -> tuple[str, ...]:
    """One for everything that is asked of attention by none of these. All families run the same decoder."""
    chosen = dict.fromkeys(map(_asked, engine_cases()), "")
    for case in _candidates():
        chosen.setdefault(_asked(case), case)
    return tuple(sorted(filter(None, chosen.values())))
