# SPDX-License-Identifier: Apache-2.0
"""Long requests do not stop the event loop, which all streams share, and do not delay short ones."""

import asyncio
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from jaxserve.frontend.prepare import Preparer
from jaxserve.server.protocol.bounds import SMALL
from jaxserve.server.workers import QUICK
from tests.server.live import answer, post
from tests.server.routes.served import Served
from tests.server.watch import Watch

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
    "keys": ("/v1/completions", {"prompt": "x"} | {f"key_{place}": 1 for place in range(100_000)}),
    "detokenize": ("/detokenize", {"tokens": list(range(20, 148)) * 1024}),
}


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
        watch = Watch(served.loop)
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


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("size", [20, 4 * QUICK])
def test_short_bodies_need_no_thread(served: Served, monkeypatch: pytest.MonkeyPatch, *, path: str, size: int) -> None:
    """Passing a short body to a thread takes longer than its work; the work of a longer one would stop the loop."""
    names: list[str] = []
    prepare = Preparer.prepare

    def seen(self: Preparer, *args: Any, **more: Any) -> Any:
        names.append(threading.current_thread().name)
        return prepare(self, *args, **more)

    monkeypatch.setattr(Preparer, "prepare", seen)
    body = {"prompt": "the"} if path == "/v1/completions" else {"messages": [{"role": "user", "content": "the"}]}
    raw = json.dumps({**body, "max_tokens": 1}).encode().ljust(size)
    assert served.post(path, raw).status == 200
    assert len(names) == 1 and names[0].startswith("jaxserve-preparer") == (size > QUICK)


def test_bodies_that_have_arrived_are_read_without_timers(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    timers: list[float] = []
    timeout_at = asyncio.timeout_at

    def seen(when: float) -> asyncio.Timeout:
        timers.append(when)
        return timeout_at(when)

    monkeypatch.setattr("jaxserve.server.http.guard.asyncio.timeout_at", seen)
    raw = json.dumps({"prompt": [5, 6], "max_tokens": 1}).encode()
    for pieces, count in (([raw], 0), ([raw[:9], raw[9:]], 1)):
        head = post("/v1/completions", raw, "Connection: close").removesuffix(raw)
        with served.connect() as sock:
            sock.sendall(head + pieces[0])
            for piece in pieces[1:]:
                time.sleep(0.2)
                sock.sendall(piece)
            assert answer(sock, "POST").status == 200
        assert len(timers) == count
