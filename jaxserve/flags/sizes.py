# SPDX-License-Identifier: Apache-2.0
"""Sizes in bytes as text: rounded for people to read, and exact as flags take them."""

_UNITS = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10))


def shown_size(count: float) -> str:
    """Such as 1.50 GiB."""
    for unit, scale in _UNITS:
        if count >= scale:
            return f"{count / scale:,.2f} {unit}"
    return f"{count:,.0f} bytes"


def given_size(count: int) -> str:
    """Such as 1536MiB: in MiB or KiB if it is a whole number of them."""
    for unit, scale in _UNITS[1:]:
        if count >= scale and count % scale == 0:
            return f"{count // scale}{unit}"
    return str(count)
