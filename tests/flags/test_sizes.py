# SPDX-License-Identifier: Apache-2.0
"""Sizes as text: for people, and so that a flag takes them back."""

from dataclasses import dataclass
from typing import Annotated

from hypothesis import given
from hypothesis import strategies as st

from jaxserve.flags.setting import Setting, flags_of
from jaxserve.flags.sizes import given_size, shown_size
from jaxserve.flags.values import from_text


@dataclass(frozen=True)
class Given:
    size: Annotated[int, Setting("Size.", unit="bytes")] = 0


@given(st.integers(0, 2**50) | st.integers(0, 2**30).map(lambda count: count << 20))
def test_a_flag_takes_the_same_size(count: int) -> None:
    [flag] = flags_of(Given)
    assert from_text(flag, given_size(count)) == count


def test_units() -> None:
    assert [given_size(count) for count in (0, 1000, 2**10, 3 * 2**19, 3 * 2**20, 2**33)] == [
        *("0", "1000", "1KiB", "1536KiB", "3MiB", "8192MiB")
    ]
    assert [shown_size(count) for count in (0, 1000, 3 * 2**9, 3 * 2**19, 3 * 2**29, 2**41)] == [
        *("0 bytes", "1,000 bytes", "1.50 KiB", "1.50 MiB", "1.50 GiB", "2,048.00 GiB")
    ]
