# SPDX-License-Identifier: Apache-2.0
"""The per-row sampling parameters in each step's vector: one int32 column each, floats as their bits.

The columns are derived from the sampling parameters that act on rows. Two columns precede them: whether the sequence
uses a row of controls, and its random seed. No jax.
"""

from operator import attrgetter
from struct import Struct

import numpy as np
import numpy.typing as npt

from jaxserve.types.parameters import Acts
from jaxserve.types.sampling_params import FIELDS, SamplingParams

OF_PARAMS = tuple(each for each in FIELDS if each.acts is Acts.ROW)
COLUMNS = ("controlled", "seed", *(each.name for each in OF_PARAMS))
# If a row uses one of these, the sampling kernel runs in the mode that applies all filters.
_FILTERS = tuple((each.name, each.off) for each in OF_PARAMS if each.name != "temperature")

_ROW = Struct("<iI" + "".join({"float32": "f", "int32": "i"}[each.dtype] for each in OF_PARAMS))
_values = attrgetter(*(each.name for each in OF_PARAMS))


def pack(params: SamplingParams, *, controlled: bool, seed: int) -> npt.NDArray[np.int32]:
    """[len(COLUMNS)]; the seed has 32 bits."""
    return np.frombuffer(_ROW.pack(controlled, seed, *_values(params)), "<i4")


def filters(params: SamplingParams) -> bool:
    """Whether sampling is restricted to a subset of the tokens."""
    return any(getattr(params, name) != off for name, off in _FILTERS)
