# SPDX-License-Identifier: Apache-2.0
"""Threads for slow work: parsing large bodies, chat templates, tokenizing, checks, large answers.

Long texts are handled by separate threads, so that short requests never wait for them.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from jaxserve.server.protocol.bounds import SMALL


class Workers:
    def __init__(self, count: int) -> None:
        self._short = ThreadPoolExecutor(count, thread_name_prefix="jaxserve-preparer")
        # Fewer, because each may hold Python's lock for up to some tens of milliseconds at a time.
        self._long = ThreadPoolExecutor(max(count // 2, 1), thread_name_prefix="jaxserve-long-preparer")

    async def run[**P, T](self, size: int, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call the function in a thread. `size`: bytes of the body that it works on."""
        pool = self._short if size <= SMALL else self._long
        return await asyncio.get_running_loop().run_in_executor(pool, partial(function, *args, **kwargs))

    def shutdown(self) -> None:
        """Cancel what has not begun. Does not wait for the rest."""
        for pool in (self._short, self._long):
            pool.shutdown(wait=False, cancel_futures=True)
