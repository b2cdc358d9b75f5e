# SPDX-License-Identifier: Apache-2.0
"""The numbers that a row is sampled by, as each step's vector holds them: a column of int32 each, floats as their bits.

The columns follow from the sampling parameters that act on rows; before them are two that a sequence has besides:
whether it uses a row of controls, and the seed of its noise. Knows no jax.
"""

from operator import attrgetter
from struct import Struct

import numpy as np
import numpy.typing as npt

from jaxserve.types.parameters import Acts
from jaxserve.types.sampling_params import FIELDS, SamplingParams

OF_PARAMS = tuple(each for each in FIELDS if each.acts is Acts.ROW)
COLUMNS = ("controlled", "seed", *(each.name for each in OF_PARAMS))
# Rows that use one of these take the sampling kernel's mode for all filters.
_FILTERS = tuple((each.name, each.off) for each in OF_PARAMS if each.name != "temperature")

_ROW = Struct("<iI" + "".join({"float32": "f", "int32": "i"}[each.dtype] for each in OF_PARAMS))
_values = attrgetter(*(each.name for each in OF_PARAMS))


def pack(params: SamplingParams, *, controlled: bool, seed: int) -> npt.NDArray[np.int32]:
    """[len(COLUMNS)]; the seed has 32 bits."""
    return np.frombuffer(_ROW.pack(controlled, seed, *_values(params)), "<i4")


def filters(params: SamplingParams) -> bool:
    """Whether sampling is from some of the tokens alone."""
    return any(getattr(params, name) != off for name, off in _FILTERS)
