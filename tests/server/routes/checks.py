# SPDX-License-Identifier: Apache-2.0
"""Checks of error responses, and a client that verifies that other requests are not affected."""

import re
import threading
from typing import Any, Self

from tests.server.live import Reply
from tests.server.routes.served import Served

TELLS = re.compile(r"0x[0-9a-f]{6,}|/home|/usr|/tmp|/work|File \"|Traceback")
PROMPT = "The sum of two and three"


def check_error(reply: Reply, status: int, param: str | None = None) -> Any:
    """The error, in OpenAI's shape. `param`: the field that it names, or a field that contains it."""
    assert reply.status == status, reply.body[:500]
    assert reply.headers["content-type"].startswith("application/json")
    assert set(reply.json) == {"error"}
    assert len(reply.body) < 2000
    error = reply.error  # of the right shape, and telling nothing of this machine
    assert isinstance(error["type"], str)
    if param is not None:
        assert re.split(r"[.\[]", error["param"])[0] == param, error
    return error


class Canary:
    """A client that repeats one greedy request: its answers must never change."""

    def __init__(self, served: Served) -> None:
        self._served = served
        self._answers: list[str] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sing, name="canary", daemon=True)

    def _ask(self) -> str:
        body = {"prompt": PROMPT, "temperature": 0, "max_tokens": 40, "ignore_eos": True, "stream": True}
        events = self._served.post("/v1/completions", body).events
        assert events[-1] == "[DONE]", events[-1]
        return "".join(event["choices"][0]["text"] for event in events[:-1])

    def _sing(self) -> None:
        while not self._stop.is_set():
            self._answers.append(self._ask())
            self._stop.wait(0.05)  # leave the processor to what is tested

    def __enter__(self) -> Self:
        self._alone = self._ask()
        assert self._alone
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(60)
        self._answers.append(self._ask())
        assert len(self._answers) > 1
        assert set(self._answers) == {self._alone}
