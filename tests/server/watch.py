# SPDX-License-Identifier: Apache-2.0
"""Watches whether an event loop keeps turning."""

import asyncio
import time


class Watch:
    """The event loop's largest gap: with Python's lock held elsewhere, it cannot run either."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.gap = 0.0
        self._running = asyncio.run_coroutine_threadsafe(self._watch(), loop)

    async def _watch(self) -> None:
        last = time.perf_counter()
        while True:
            await asyncio.sleep(0.001)
            now = time.perf_counter()
            self.gap, last = max(self.gap, now - last), now

    def end(self) -> float:
        self._running.cancel()
        return self.gap
