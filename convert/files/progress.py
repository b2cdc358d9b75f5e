# SPDX-License-Identifier: Apache-2.0
"""A progress bar in bytes on a terminal; silent when stderr is not a terminal."""

import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager

from tqdm import tqdm


@contextmanager
def bar(label: str, total: int) -> Generator[Callable[[int], object]]:
    """Yield a callback that advances the bar by a number of bytes."""
    with tqdm(total=total, desc=label, unit="B", unit_scale=True, disable=not sys.stderr.isatty()) as shown:
        yield shown.update
