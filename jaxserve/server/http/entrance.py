# SPDX-License-Identifier: Apache-2.0
"""Spreads the beginning of many requests over several turns of the event loop.

When hundreds of bodies arrive together, aiohttp starts all their handlers in one turn of the loop, which takes some
tenths of a second. Meanwhile no stream gets a token, and nobody sees that the first of these requests has an answer.
"""

import asyncio
from collections import deque

AT_ONCE = 8  # they take a few milliseconds


class Entrance:
    """Lets AT_ONCE requests begin per turn of the event loop, in order of arrival. For one event loop."""

    def __init__(self) -> None:
        self._free = AT_ONCE
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def enter(self) -> None:
        loop = asyncio.get_running_loop()
        if self._free == AT_ONCE:  # the first in this turn
            loop.call_soon(self._next, loop)
        if self._free:
            self._free -= 1
            return
        turn: asyncio.Future[None] = loop.create_future()
        self._waiting.append(turn)
        await turn

    def _next(self, loop: asyncio.AbstractEventLoop) -> None:
        self._free = AT_ONCE
        while self._free and self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():  # else its client has left
                turn.set_result(None)
                self._free -= 1
        if self._free < AT_ONCE:
            loop.call_soon(self._next, loop)
