# SPDX-License-Identifier: Apache-2.0
"""The values that codes of 4 bits stand for, by kind."""

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # a sign, 2 bits of exponent, 1 of mantissa
_FP4 = (0.0, 0.0625 / 12, 8 / 12, 1.0, 4 / 12, 6 / 12, 2 / 12, 3 / 12)  # bitsandbytes': the largest is 1

VALUES: dict[str, tuple[float, ...]] = {
    "e2m1": (*_E2M1, *(-each for each in _E2M1)),
    "fp4": (*_FP4, *(-each for each in _FP4)),
    "nf4": (  # bitsandbytes': quantiles of the normal distribution
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ),
}
