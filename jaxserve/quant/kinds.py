# SPDX-License-Identifier: Apache-2.0
"""All kinds of weight: importing a kind's module registers it."""

from jaxserve.quant import groups, int8
from jaxserve.quant.tensor import KINDS

__all__ = ["KINDS", "groups", "int8"]
