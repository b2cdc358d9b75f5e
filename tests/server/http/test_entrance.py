# SPDX-License-Identifier: Apache-2.0
"""Many requests at once begin a few at a time, in order; in between, the event loop does its other work."""

import asyncio
import itertools

from jaxserve.server.http.entrance import AT_ONCE, Entrance


def test_a_burst_begins_over_many_turns_of_the_loop() -> None:
    async def scenario() -> tuple[list[int], list[int]]:
        entrance, begun, seen = Entrance(), list[int](), list[int]()
        loop = asyncio.get_running_loop()

        async def request(number: int) -> None:
            await entrance.enter()
            begun.append(number)

        def look() -> None:  # once per turn of the loop
            seen.append(len(begun))
            if len(begun) < 100:
                loop.call_soon(look)

        loop.call_soon(look)
        async with asyncio.TaskGroup() as group:
            for number in range(100):
                group.create_task(request(number))
        return begun, seen

    begun, seen = asyncio.run(scenario())
    assert begun == list(range(100))
    assert max(later - earlier for earlier, later in itertools.pairwise(seen)) <= AT_ONCE


def test_clients_that_leave_do_not_hold_up_the_others() -> None:
    async def scenario() -> list[int]:
        entrance, begun = Entrance(), list[int]()

        async def request(number: int) -> None:
            await entrance.enter()
            begun.append(number)

        tasks = [asyncio.create_task(request(number)) for number in range(10 * AT_ONCE)]
        await asyncio.sleep(0)
        for task in tasks[2 * AT_ONCE : 9 * AT_ONCE]:
            task.cancel()
        await asyncio.wait(tasks, timeout=10)
        async with asyncio.timeout(10):  # and later ones are let in
            await request(1000)
        return begun

    assert asyncio.run(scenario()) == [*range(2 * AT_ONCE), *range(9 * AT_ONCE, 10 * AT_ONCE), 1000]
