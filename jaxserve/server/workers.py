# SPDX-License-Identifier: Apache-2.0
"""Threads for slow work: parsing large bodies, chat templates, tokenizing, checks, large answers.

Long texts are handled by separate threads, so that short requests never wait for them. Long work in which no other
Python thread runs has one thread, because the event loop may have to wait for as many such calls as there are threads.
What takes no longer than to pass it to a thread is done at once.
"""

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from jaxserve.server.protocol.bounds import SMALL

QUICK = 2**12  # bytes of a body whose prompts are encoded and checked in less than a millisecond


class Workers:
    def __init__(self, count: int) -> None:
        self._short = _started(count, "jaxserve-preparer")
        self._long = _started(max(count // 2, 1), "jaxserve-long-preparer")
        self._alone = _started(1, "jaxserve-parser")

    async def run[**P, T](self, size: int, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call the function in a thread. `size`: bytes of the body that it works on."""
        pool = self._short if size <= SMALL else self._long
        return await asyncio.get_running_loop().run_in_executor(pool, partial(function, *args, **kwargs))

    async def run_alone[**P, T](self, size: int, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Like `run`, for work that holds Python's lock while it lasts, such as to parse a body."""
        if size <= SMALL:
            return await self.run(size, function, *args, **kwargs)
        return await asyncio.get_running_loop().run_in_executor(self._alone, partial(function, *args, **kwargs))

    async def prepare[**P, T](self, size: int, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Like `run`, for work that takes as long as the body is: a short one's is done at once."""
        return function(*args, **kwargs) if size <= QUICK else await self.run(size, function, *args, **kwargs)

    def shutdown(self) -> None:
        """Cancel what has not begun. Does not wait for the rest."""
        for pool in (self._short, self._long, self._alone):
            pool.shutdown(wait=False, cancel_futures=True)


def _started(count: int, name: str) -> ThreadPoolExecutor:
    """A pool that has all of its threads: a server whose threads become more over time looks like one that leaks."""
    pool, together = ThreadPoolExecutor(count, thread_name_prefix=name), threading.Barrier(count + 1)
    for _ in range(count):
        pool.submit(together.wait)
    together.wait()
    return pool
