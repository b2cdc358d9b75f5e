# SPDX-License-Identifier: Apache-2.0
"""Event streams: usage, the number of tokens per chunk, and every way in which a stream may end."""

import asyncio
import json
import threading
from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import Any

import pytest

from jaxserve.errors import EngineError
from jaxserve.server import requests
from jaxserve.server.answers import generation
from jaxserve.server.answers.logprobs import CompletionLogprobs
from jaxserve.server.errors import ApiError
from jaxserve.types.outputs import CompletionOutput, RequestOutput
from tests.server.routes.checks import TELLS, check_error
from tests.server.routes.served import Served, flat

BODY: dict[str, Any] = {"prompt": "The sum of", "max_tokens": 12, "temperature": 0, "ignore_eos": True, "stream": True}
CHAT: dict[str, Any] = {**BODY, "messages": [{"role": "user", "content": "hi"}]}
del CHAT["prompt"]


def test_headers(served: Served) -> None:
    reply = served.post("/v1/completions", BODY)
    assert reply.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert reply.headers["cache-control"] == "no-cache"


def test_usage_comes_last_and_only_on_request(served: Served) -> None:
    *chunks, done = served.post("/v1/completions", BODY).events
    assert done == "[DONE]" and all(chunk["choices"] and "usage" not in chunk for chunk in chunks)
    *chunks, last, done = served.post("/v1/completions", {**BODY, "stream_options": {"include_usage": True}}).events
    assert done == "[DONE]" and last["choices"] == []
    whole = served.post("/v1/completions", {**BODY, "stream": False}).json["usage"]
    for name in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert last["usage"][name] == whole[name]


def test_large_events_are_made_in_a_thread(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """The log probabilities of an echoed prompt must not block the event loop, also for further samples."""
    body = {**BODY, "echo": True, "logprobs": 2, "n": 2, "temperature": 1, "seed": 3}
    chunks = served.post("/v1/completions", body).events
    threads: list[str] = []
    add = CompletionLogprobs.add

    def seen(*args: Any) -> Any:
        threads.append(threading.current_thread().name)
        return add(*args)

    monkeypatch.setattr(CompletionLogprobs, "add", seen)
    monkeypatch.setattr(generation, "MANY", 6)
    again = served.post("/v1/completions", body).events
    assert joined(chunks) == joined(again)
    large = [name for name in threads if name.startswith("jaxserve-preparer")]
    assert 2 <= len(large) < len(threads)


def joined(events: list[Any]) -> list[tuple[str, list[str]]]:
    parts = [event["choices"][0] for event in events[:-1]]
    mine = [[part for part in parts if part["index"] == index] for index in (0, 1)]
    return [("".join(part["text"] for part in one), flat(part["logprobs"]["tokens"] for part in one)) for one in mine]


def test_usage_on_every_chunk(served: Served) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    for path, body in (("/v1/completions", BODY), ("/v1/chat/completions", CHAT)):
        *chunks, last, _ = served.post(path, {**body, "stream_options": options}).events
        counts = [chunk["usage"]["completion_tokens"] for chunk in [*chunks, last]]
        assert counts == sorted(counts) and counts[-1] == 12
        assert all(chunk["usage"]["prompt_tokens"] == last["usage"]["prompt_tokens"] for chunk in chunks)


def test_usage_enforced_by_the_server(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    monkeypatch.setattr(served.serving, "config", replace(served.serving.config, enable_force_include_usage=True))
    assert served.post("/v1/completions", BODY).events[-2]["usage"]["completion_tokens"] == 12


@pytest.mark.parametrize("interval", [1, 5, 100])
def test_chunks_by_the_number(served: Served, interval: int) -> None:
    body = {**BODY, "stream_interval": interval, "return_token_ids": True, "n": 1}
    parts = [event["choices"][0] for event in served.post("/v1/completions", body).events[:-1]]
    whole = served.post("/v1/completions", {**body, "stream": False, "stream_interval": None}).json["choices"][0]
    assert "".join(part["text"] for part in parts) == whole["text"]
    assert flat(part["token_ids"] for part in parts) == whole["token_ids"]
    assert all(len(part["token_ids"]) >= interval for part in parts[1:-1])
    assert parts[-1]["finish_reason"] == "length"


# --- ends that an engine does not come to by itself: what it says is made up -----------------------------------------


def _says(output: RequestOutput | None, end: Exception | None) -> Any:
    async def run(*_: object, **__: object) -> AsyncGenerator[tuple[int, RequestOutput]]:
        if output is not None:
            yield 0, output
        await asyncio.sleep(0)
        if end is not None:
            raise end

    return run


def _output(text: str, **more: Any) -> RequestOutput:
    sample = CompletionOutput(0, text, [5], **more)
    return RequestOutput("1", "x", [5], [sample], finished=sample.finished)


async def _silence(request: Any, *_: object, **__: object) -> AsyncGenerator[tuple[int, RequestOutput]]:
    await asyncio.sleep(0.4)
    yield 0, _output("begun")
    await asyncio.sleep(0.4)
    yield 0, _output("ended", finish_reason="length")


@pytest.mark.parametrize("seconds", [0.05, 0.0])
@pytest.mark.parametrize(("path", "body"), [("/v1/completions", BODY), ("/v1/chat/completions", CHAT)])
def test_comments_keep_a_silent_stream_alive(
    served: Served, monkeypatch: pytest.MonkeyPatch, *, path: str, body: Any, seconds: float
) -> None:
    """Before the first token, while a request is queued, and between tokens; not on a stream that has news."""
    assert b": keep-alive" not in served.post(path, body).body
    monkeypatch.setattr(served.serving, "config", replace(served.serving.config, sse_keep_alive=seconds))
    monkeypatch.setattr(requests, "run", _silence)
    reply = served.post(path, body)
    before, begun, rest = reply.body.partition(b"begun")
    after = rest.partition(b"ended")[0]
    assert begun and reply.status == 200 and reply.events[-1] == "[DONE]"
    for silence in (before, after):
        comments = silence.count(b": keep-alive\n\n")
        assert 1 <= comments <= 8 if seconds else comments == 0


def test_a_fault_after_a_comment_is_an_event(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    async def run(*_: object, **__: object) -> AsyncGenerator[tuple[int, RequestOutput]]:
        await asyncio.sleep(0.3)
        raise ApiError(504, "too late")
        yield

    monkeypatch.setattr(served.serving, "config", replace(served.serving.config, sse_keep_alive=0.05))
    monkeypatch.setattr(requests, "run", run)
    reply = served.post("/v1/completions", BODY)
    assert reply.status == 200 and reply.body.startswith(b": keep-alive\n\n")
    assert reply.events[0]["error"]["code"] == 504 and reply.events[-1] == "[DONE]"


FAULTS: list[tuple[Exception, int]] = [
    (EngineError("the engine's thread failed: /home/me/x.py at 0x7f0012345678", "restart it"), 500),
    (ApiError(504, "The request exceeded its deadline."), 504),
    (RuntimeError("Traceback: /usr/lib"), 500),
]


@pytest.mark.parametrize(("fault", "status"), FAULTS, ids=lambda value: type(value).__name__)
@pytest.mark.parametrize(("path", "body"), [("/v1/completions", BODY), ("/v1/chat/completions", CHAT)])
def test_a_fault_before_the_first_output_is_a_status(
    served: Served, monkeypatch: pytest.MonkeyPatch, *, path: str, body: Any, fault: Exception, status: int
) -> None:
    monkeypatch.setattr(requests, "run", _says(None, fault))
    check_error(served.post(path, body), status)
    check_error(served.post(path, {**body, "stream": False}), status)


@pytest.mark.parametrize(("fault", "status"), FAULTS, ids=lambda value: type(value).__name__)
@pytest.mark.parametrize(("path", "body"), [("/v1/completions", BODY), ("/v1/chat/completions", CHAT)])
def test_a_fault_in_a_stream_is_an_event_and_done_follows(
    served: Served, monkeypatch: pytest.MonkeyPatch, *, path: str, body: Any, fault: Exception, status: int
) -> None:
    monkeypatch.setattr(requests, "run", _says(_output("begun"), fault))
    reply = served.post(path, body)
    assert reply.status == 200
    *chunks, error, done = reply.events
    assert done == "[DONE]" and chunks
    assert set(error["error"]) == {"message", "type", "param", "code"} and error["error"]["code"] == status
    assert not TELLS.search(reply.body.decode())
    check_error(served.post(path, {**body, "stream": False}), status)


def test_a_request_that_the_engine_aborts(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = _output("", finish_reason="error", error='the logits of File "/home/x.py" are not finite')
    monkeypatch.setattr(requests, "run", _says(broken, None))
    for path, body in (("/v1/completions", BODY), ("/v1/chat/completions", CHAT)):
        assert "not finite" in check_error(served.post(path, {**body, "stream": False}), 500)["message"]
        check_error(served.post(path, body), 500)


def test_an_aborted_request_ends_as_aborted(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requests, "run", _says(_output("so far", finish_reason="abort"), None))
    events = served.post("/v1/completions", BODY).events
    assert events[-2]["choices"][0]["finish_reason"] == "abort" and events[-1] == "[DONE]"
    choice = served.post("/v1/chat/completions", {**CHAT, "stream": False}).json["choices"][0]
    assert choice["finish_reason"] == "abort" and choice["message"]["content"] == "so far"


def test_outputs_of_several_samples_are_one_write(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = [CompletionOutput(index, "x", [5], finish_reason="stop") for index in range(3)]
    both = RequestOutput("1", "x", [5], samples, finished=True)
    monkeypatch.setattr(requests, "run", _says(both, None))
    events = served.post("/v1/completions", {**BODY, "n": 3, "temperature": 1}).events
    assert [event["choices"][0]["index"] for event in events[:-1]] == [0, 1, 2]


# --- how events reach the socket -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("path", "body"), [("/v1/completions", BODY), ("/v1/chat/completions", CHAT)])
@pytest.mark.parametrize("n", [1, 3])
def test_most_events_need_no_task(
    served: Served, monkeypatch: pytest.MonkeyPatch, *, path: str, body: Any, n: int
) -> None:
    """Tasks are woken for the begin, for ends of samples and for clients that do not read; not for each token."""
    woken: list[RequestOutput] = []
    send = generation._Chunks._send  # pyright: ignore[reportPrivateUsage]

    async def seen(self: Any, place: int, output: RequestOutput) -> None:
        woken.append(output)
        await send(self, place, output)

    monkeypatch.setattr(generation._Chunks, "_send", seen)  # pyright: ignore[reportPrivateUsage]
    body = {**body, "n": n, "temperature": 1, "seed": 5, "max_tokens": 40, "min_tokens": 40}
    events = served.post(path, body).events
    whole = served.post(path, {**body, "stream": False}).json["choices"]
    assert [_text(events, index) for index in range(n)] == [_text([{"choices": whole}], index) for index in range(n)]
    assert 2 <= len(woken) <= 4 * n + 4 < len(events)


def _text(events: list[Any], index: int) -> str:
    choices = [event["choices"][0] for event in events[:-1] if event != "[DONE]"] if len(events) > 1 else []
    choices = choices or events[0]["choices"]
    mine = [choice for choice in choices if choice["index"] == index]
    shapes = [choice.get("delta") or choice.get("message") or choice for choice in mine]
    return "".join(shape.get("content") or shape.get("text") or "" for shape in shapes)


def test_a_short_answer_is_one_write(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Headers, events and the end: each write costs a packet, and a wake-up of the client."""
    writes: list[bytes] = []
    transport: Any = asyncio.selector_events._SelectorSocketTransport  # pyright: ignore
    write = transport.write

    def seen(self: Any, data: bytes) -> None:
        writes.append(bytes(data))
        write(self, data)

    monkeypatch.setattr(transport, "write", seen)
    assert len(served.post("/v1/completions", {**BODY, "max_tokens": 1, "logprobs": 1}).events) == 2
    assert len(writes) == 1 and writes[0].startswith(b"HTTP/1.1 200") and writes[0].endswith(b"[DONE]\n\n\r\n0\r\n\r\n")


@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_the_framing_of_events(served: Served, version: str) -> None:
    """Chunks in HTTP/1.1; in HTTP/1.0, which has none, the end of the connection ends the answer."""
    body = json.dumps({**BODY, "max_tokens": 30}).encode()
    head = f"POST /v1/completions HTTP/{version}\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    raw = f"{head}Connection: close\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body
    with served.connect() as sock:
        sock.sendall(raw)
        received = b"".join(iter(lambda: sock.recv(65536), b""))
    headers, _, rest = received.partition(b"\r\n\r\n")
    assert (b"transfer-encoding: chunked" in headers.lower()) == (version == "1.1")
    text, chunks = rest, 0
    if version == "1.1":
        text, size = b"", -1
        while size:
            length, _, rest = rest.partition(b"\r\n")
            size = int(length, 16)
            text, end, rest = text + rest[:size], rest[size : size + 2], rest[size + 2 :]
            chunks += 1
            assert end == b"\r\n"
        assert rest == b"" and chunks > 10
    events = [event.removeprefix(b"data: ") for event in text.split(b"\n\n") if event]
    assert events[-1] == b"[DONE]"
    whole = served.post("/v1/completions", {**BODY, "max_tokens": 30, "stream": False}).json["choices"][0]["text"]
    assert "".join(json.loads(event)["choices"][0]["text"] for event in events[:-1]) == whole
