# SPDX-License-Identifier: Apache-2.0
"""The client's count of open sequences, without an engine."""

import asyncio
from typing import Any

from jaxserve.frontend.client import EngineClient
from jaxserve.frontend.prepare import Preparer
from jaxserve.frontend.streams import Streams
from jaxserve.types.outputs import Update
from jaxserve.types.request import Request
from jaxserve.types.sampling_params import SamplingParams
from tests.engine.fakes import limits


class Link:
    """An engine that is never heard from by itself."""

    def __init__(self) -> None:
        self.streams = Streams()
        self.add = self.streams.add

    def check_alive(self) -> None: ...

    def drop(self, stream: Any) -> None:
        self.streams.remove(stream)

    def call(self, name: str, /, **arguments: Any) -> Any:
        raise AssertionError(name)


def test_sequences_are_open_until_the_engine_has_finished_them() -> None:
    """Not until their consumers have taken the output: one that reads slowly takes no row."""

    async def scenario() -> None:
        link = Link()
        client = EngineClient(link, Preparer(None, limits()))

        def opened(name: str, tenant: str, n: int) -> Any:
            params = SamplingParams(n=n, detokenize=False)
            return client.open(Request(id=name, tenant=tenant, prompt_token_ids=[1], params=params))

        slow, left = opened("slow", "a", 2), opened("left", "b", 1)
        assert client.open_sequences() == {"a": 2, "b": 1}
        ends = [Update(request_id=slow.request.id, index=i, token_ids=[5], finish_reason="length") for i in range(2)]
        link.streams.take(ends)
        assert client.open_sequences() == {"b": 1} and not slow.finished
        client.close(left)
        assert client.open_sequences() == {}
        assert (await slow.next()).finished
        client.close(slow)

    asyncio.run(scenario())
