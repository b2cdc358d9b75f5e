# SPDX-License-Identifier: Apache-2.0
"""A bar on the terminal with the bytes done and their rate; nothing where nobody watches."""

import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager

from tqdm import tqdm


@contextmanager
def bar(label: str, total: int) -> Generator[Callable[[int], object]]:
    """Gives what is to be told of bytes as they are done."""
    with tqdm(total=total, desc=label, unit="B", unit_scale=True, disable=not sys.stderr.isatty()) as shown:
        yield shown.update
