# SPDX-License-Identifier: Apache-2.0
"""Long requests do not stop the event loop, which all streams share, and do not delay short ones."""

import asyncio
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from jaxserve.server.protocol.bounds import SMALL
from tests.server.routes.served import Served

SENTENCE = "The sum of two and three is five, as everyone knows. "
TEXT = SENTENCE * (2**18 // len(SENTENCE))
CLIENTS = 3
LONG: dict[str, tuple[str, dict[str, Any]]] = {
    "tokenize": ("/tokenize", {"prompt": TEXT}),
    "truncate": ("/v1/completions", {"prompt": TEXT, "truncate_prompt_tokens": 5, "max_tokens": 1}),
    "chat": ("/tokenize", {"messages": [{"role": "user", "content": SENTENCE}] * 4000}),
    "ids": ("/v1/completions", {"prompt": [5] * 2**17, "max_tokens": 1}),
    "text": ("/v1/completions", {"prompt": "\u4e2d\n" * 2**20, "max_tokens": 1}),
    "message": ("/v1/chat/completions", {"messages": [{"role": "user", "content": "\u4e2d\n" * 2**20}]}),
    "detokenize": ("/detokenize", {"tokens": list(range(20, 148)) * 1024}),
}


class Watch:
    """The event loop's largest gap: with Python's lock held elsewhere, it cannot run either."""

    def __init__(self, served: Served) -> None:
        self.gap = 0.0
        self._running = asyncio.run_coroutine_threadsafe(self._watch(), served.loop)

    async def _watch(self) -> None:
        last = time.perf_counter()
        while True:
            await asyncio.sleep(0.001)
            now = time.perf_counter()
            self.gap, last = max(self.gap, now - last), now

    def end(self) -> float:
        self._running.cancel()
        return self.gap


def seconds_with_the_lock(served: Served, text: str) -> float:
    """How long one text would stop everything if it were tokenized with Python's lock held."""
    tokenizer = served.serving.tokenizer
    assert tokenizer is not None
    begin = time.perf_counter()
    tokenizer._backend.encode(text)  # pyright: ignore[reportPrivateUsage]
    return time.perf_counter() - begin


@pytest.mark.parametrize("name", LONG)
def test_the_event_loop_goes_on_under_long_requests(served: Served, name: str) -> None:
    path, body = LONG[name]
    raw = json.dumps(body).encode()
    assert len(raw) > SMALL
    before = seconds_with_the_lock(served, TEXT)
    with ThreadPoolExecutor(CLIENTS) as clients:
        watch = Watch(served)
        replies = list(clients.map(lambda _: served.post(path, raw), range(CLIENTS)))
        gap = watch.end()
    assert {reply.status for reply in replies} <= {200, 400}
    assert gap < max(before / 2, 0.25)


def test_short_requests_do_not_wait_for_long_ones(served: Served) -> None:
    go_on = threading.Event()
    workers, loop = served.serving.workers, served.loop
    waiting = [asyncio.run_coroutine_threadsafe(workers.run(2**20, go_on.wait), loop) for _ in range(8)]
    try:
        assert served.post("/tokenize", {"prompt": "short"}).status == 200
        assert served.complete(max_tokens=2).status == 200
        assert not any(each.done() for each in waiting)
    finally:
        go_on.set()
    assert all(each.result(60) for each in waiting)


def test_many_prompts_of_a_body_are_answered_in_order(served: Served) -> None:
    """More of them than are handled at once."""
    prompts = [[number + 1, 7] for number in range(40)]
    reply = served.post("/v1/completions", {"prompt": prompts, "max_tokens": 1, "echo": True, "return_token_ids": True})
    choices = reply.json["choices"]
    assert [choice["index"] for choice in choices] == list(range(40))
    assert [choice["prompt_token_ids"] for choice in choices] == prompts
