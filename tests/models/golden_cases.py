# SPDX-License-Identifier: Apache-2.0
"""Which golden cases go which way: all through the dense one, and of those alike to paged attention one through it.

Of these again one of each architecture goes through the whole engine, and the others through the decoder's step alone.
"""

from functools import cache

from jaxserve.models import registry
from jaxserve.models.spec import Attention
from tests.golden import load as golden

TOLERANCE = 2e-4  # of the logits' spread

# Here transformers computes the whole text anew when it becomes long: each token has the RoPE length of what is before
# it. A request keeps to one length for its life.
CROSSING = ("phi3-longrope-crossing",)


@cache
def paged_cases() -> tuple[str, ...]:
    """The ways differ within attention alone, so that one case of a family serves all that ask the same of it there:
    the one of fewest layers, which compiles fastest."""
    chosen: dict[object, tuple[int, str]] = {}
    for case in golden.cases():
        spec = registry.spec_of(golden.read(case).config)
        asked = frozenset(
            (attention.window is not None, attention.soft_cap is not None, attention.sinks, attention.group > 1)
            if isinstance(attention := layer.attention, Attention)
            else ("latent", attention.q_rank is None)
            for layer in spec.layers
        )
        key = (spec.family, spec.needs_rope_length, spec.learned_positions is None, asked)
        if case not in CROSSING:
            chosen[key] = min((len(spec.layers), case), chosen.get(key, (1000, "")))
    return tuple(sorted(case for _, case in chosen.values()))


@cache
def engine_cases() -> tuple[str, ...]:
    """One of each architecture, and of each that has a RoPE which depends on the sequence's length."""
    chosen: dict[tuple[str, bool], str] = {}
    for case in paged_cases():
        config = golden.read(case).config
        chosen.setdefault((config["architectures"][0], registry.spec_of(config).needs_rope_length), case)
    return tuple(sorted(chosen.values()))
