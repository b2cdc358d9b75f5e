# SPDX-License-Identifier: Apache-2.0
"""The application over a tiny model, in this process and on a free port; its event loop runs in another thread.

Everything except the engine's process is real: routes, middleware, connections, the client of the engine.
"""

import itertools
from collections.abc import Iterable
from typing import Any

import openai

from jaxserve.async_llm import AsyncLLM
from tests.server.shell import MODEL, Shell


def openai_client(port: int) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=60)


def flat(lists: Iterable[list[Any]]) -> list[Any]:
    return list(itertools.chain.from_iterable(lists))


class Served(Shell):
    def __init__(self, llm: AsyncLLM, **settings: Any) -> None:
        super().__init__(served_model_name=(MODEL, "owner/other-name"), **settings)
        self.llm = llm
        self.engine.state.phase = "ready"
        client = llm._client  # pyright: ignore[reportPrivateUsage]
        self.serving.client, self.serving.tokenizer = client, client.preparer.tokenizer
        self._client: openai.OpenAI | None = None

    def __exit__(self, *exception: object) -> None:
        if self._client is not None:
            self._client.close()
        super().__exit__(*exception)

    def client(self) -> openai.OpenAI:
        if self._client is None:
            self._client = openai_client(self.port)
        return self._client

    def in_flight(self) -> int:
        assert self.serving.client is not None
        return len(self.serving.client.names())
