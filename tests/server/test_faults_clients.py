# SPDX-License-Identifier: Apache-2.0
"""Clients that disconnect, do not read, are too many or too late, against a real server with a slow engine. A stream
beside them gets the same tokens as alone, and rows and blocks are freed."""

import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.server import live as living
from tests.server.live import PATIENCE, Live, Reply, answer, closed, post, wait

ASLEEP = 'jaxserve:admission_rejections_total{reason="asleep"}'
LATENCIES = ("jaxserve:time_to_first_token_seconds_count", "jaxserve:e2e_request_latency_seconds_count")
RUNNING = "jaxserve:num_requests_running"
CANARY = {"prompt": "one two three", "temperature": 0, "max_tokens": 40, "ignore_eos": True}


@pytest.fixture(scope="module")
def slow(model: Path) -> Iterator[Live]:
    engine = {"max_num_queued_reqs": 4}
    server = {"stream_timeout": 1.0, "log_format": "json", "enable_log_requests": True, "api_key": []}
    with living.live(model, engine=engine, server=server, slow=0.02) as one:
        yield one


@pytest.fixture(scope="module")
def alone(slow: Live) -> str:
    """The canary's tokens when it is the only request."""
    return text_of(slow.post("/v1/completions", CANARY))


@pytest.fixture(autouse=True)
def canary(slow: Live, alone: str) -> Iterator[Future[Reply]]:
    """Run one stream beside each test; afterwards nothing of the test is left."""
    slow.wait_idle()
    with ThreadPoolExecutor(1) as pool:
        beside = pool.submit(slow.post, "/v1/completions", CANARY | {"stream": True})
        yield beside
        reply = beside.result()
    if reply.status == 503:  # it came while the queue was full: then it may be refused, and nothing else
        reply = slow.post("/v1/completions", CANARY | {"stream": True})
    assert "".join(event["choices"][0]["text"] for event in reply.events[:-1] if event["choices"]) == alone
    slow.wait_idle()
    assert slow.get("/health").status == 200


def text_of(reply: Reply) -> str:
    assert reply.status == 200, reply.body
    return reply.json["choices"][0]["text"]


def running(server: Live) -> float:
    return server.metrics()[RUNNING]


def until(sock: socket.socket, mark: bytes, times: int = 1) -> bytes:
    data = b""
    while data.count(mark) < times:
        more = sock.recv(65536)
        assert more, data
        data += more
    return data


def test_a_body_with_more_prompts_than_the_queue_holds(slow: Live, canary: Future[Reply]) -> None:
    """It is served while there are rows for them: only what waits counts."""
    canary.result()
    reply = slow.post("/v1/completions", {"prompt": ["a", "b", "c"] * 2, "max_tokens": 2})
    assert (reply.status, len(reply.json["choices"])) == (200, 6)
    assert slow.post("/v1/completions", {"prompt": "a", "n": 8, "temperature": 1, "max_tokens": 2}).status == 200


def test_clients_that_disconnect_before_the_first_token(slow: Live) -> None:
    for stream in (True, False):
        with slow.open_stream(stream=stream):
            pass
        with slow.connect() as sock:  # the request itself is not whole
            sock.sendall(post("/v1/completions", b'{"prompt": "a"}')[:-3])


def test_clients_that_disconnect_in_the_middle(slow: Live) -> None:
    with slow.open_stream() as sock:
        until(sock, b"data: ", 3)
    with slow.open_stream(stream=False):
        wait(lambda: running(slow) >= 2)
    with slow.open_stream(n=4, temperature=1) as sock:
        until(sock, b"data: ", 8)
    with slow.open_stream(prompt=["a", "b", "c"]) as sock:
        until(sock, b"data: ", 8)


def test_rows_come_back_within_a_second(slow: Live, canary: Future[Reply]) -> None:
    canary.result()
    with slow.open_stream(n=4, temperature=1) as sock:
        until(sock, b"data: ", 4)
        wait(lambda: running(slow) == 4)
    begin = time.monotonic()
    slow.wait_idle(1.0)
    assert time.monotonic() - begin < 1.0


def test_many_disconnect_at_once(slow: Live) -> None:
    socks = [slow.open_stream(stream=number % 2 == 0) for number in range(100)]
    time.sleep(0.3)
    for sock in socks:
        sock.close()


def test_latencies_count_clients_that_leave(slow: Live, canary: Future[Reply]) -> None:
    """Those that waited longest leave first: without them the histograms look good under overload."""
    canary.result()
    slow.wait_idle()

    def counts() -> tuple[float, ...]:
        metrics = slow.metrics()
        return tuple(metrics[name] for name in LATENCIES)

    first, whole = counts()
    with slow.open_stream() as sock:
        until(sock, b"data: ", 3)
    wait(lambda: counts() == (first + 1, whole + 1))
    with slow.open_stream(stream=False):
        wait(lambda: running(slow) == 1)
    wait(lambda: counts() == (first + 2, whole + 2) or counts() == (first + 1, whole + 2))
    slow.wait_idle()


def test_a_client_that_does_not_read_is_disconnected(slow: Live) -> None:
    body = {"prompt": "a", "max_tokens": 240, "stream": True, "n": 4, "logprobs": 20, "temperature": 1, "seed": 1}
    with slow.connect() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        raw = json.dumps({**body, "ignore_eos": True}).encode()
        sock.sendall(post("/v1/completions", raw, "X-Request-Id: unread"))
        assert sock.recv(16)
        wait(lambda: '"id": "unread", "status": 499' in slow.log, 30)
        assert "the client read nothing for" in slow.log
        assert closed(sock)


def test_a_slow_reader_gets_all_of_it(slow: Live) -> None:
    body = {"prompt": "a", "max_tokens": 60, "stream": True, "ignore_eos": True, "temperature": 0}
    whole = text_of(slow.post("/v1/completions", body | {"stream": False}))
    with slow.connect() as sock:
        sock.sendall(post("/v1/completions", json.dumps(body).encode(), "Connection: close"))
        data = b""
        while more := sock.recv(400):
            data += more
            time.sleep(0.005)
    said = re.findall(rb"data: (\{.*\})", data)
    assert "".join(json.loads(event)["choices"][0]["text"] for event in said) == whole


def test_rejected_requests_get_a_retry_after(slow: Live) -> None:
    with ThreadPoolExecutor(30) as pool:
        replies = list(pool.map(lambda _: slow.complete(30), range(30)))
    statuses = [reply.status for reply in replies]
    assert set(statuses) == {200, 503}
    assert statuses.count(200) >= 4
    for reply in replies:
        if reply.status == 503:
            assert 1 <= int(reply.headers["retry-after"]) <= 60
            assert reply.error["type"] == "ServiceUnavailableError"
        else:
            assert reply.json["usage"]["completion_tokens"] == 30
    assert slow.metrics()['jaxserve:admission_rejections_total{reason="queue_full"}'] >= statuses.count(503)


def test_a_body_with_one_rejected_prompt_is_rejected(slow: Live, canary: Future[Reply]) -> None:
    canary.result()
    with slow.open_stream() as sock:
        until(sock, b"data: ")
        reply = slow.complete(30, prompt=["a"] * 12, stream=True)
    assert reply.status == 503
    assert reply.error


def test_a_body_larger_than_the_queue_is_a_client_error(slow: Live) -> None:
    reply = slow.complete(1, prompt=["a"] * 13)
    assert (reply.status, reply.error["param"]) == (400, "prompt")
    for number in ("13", "12", "8", "4"):
        assert number in reply.error["message"]


def test_embeddings_of_more_than_the_queue_holds(slow: Live, canary: Future[Reply]) -> None:
    canary.result()
    reply = slow.post("/v1/embeddings", {"input": ["a", "b c"] * 10}, X_Request_Id="vectors")
    assert [item["index"] for item in reply.json["data"]] == list(range(20))
    [one, other] = [slow.post("/v1/embeddings", {"input": text}).json["data"][0]["embedding"] for text in ("a", "b c")]
    assert [item["embedding"] for item in reply.json["data"]] == [
        pytest.approx(each, abs=1e-5) for each in [one, other] * 10
    ]
    [line] = [json.loads(line) for line in slow.log.splitlines() if '"id": "vectors"' in line]
    assert line["prompt_tokens"] == reply.json["usage"]["prompt_tokens"]


def test_deadlines(slow: Live) -> None:
    slow.complete(2, prompt="a")  # compiles what is not yet
    # The server cannot know that this stop string never comes; else it would refuse the requests at once.
    body = {"prompt": "a", "max_tokens": 200, "ignore_eos": True, "stop": "no such text"}
    begin = time.monotonic()
    reply = slow.post("/v1/completions", body, X_Request_Timeout="0.4", X_Request_Id="late")
    assert (reply.status, reply.error["type"]) == (504, "TimeoutError")
    assert time.monotonic() - begin < 3
    [line] = [json.loads(line) for line in slow.log.splitlines() if '"id": "late"' in line]
    assert line["generated_tokens"] > 0  # it came to those, and they are counted
    assert line["tokens_per_second"] is None or line["tokens_per_second"] > 0
    reply = slow.post("/v1/completions", body | {"stream": True}, X_Request_Timeout="0.4")
    assert reply.status == 200
    assert reply.events[-1] == "[DONE]"
    assert reply.events[-2]["error"]["code"] == 504


def test_abort_requests(slow: Live) -> None:
    ends: list[Reply] = []

    def ask(name: str, stream: bool) -> None:
        body = {"prompt": "a", "max_tokens": 200, "ignore_eos": True, "stream": stream, "n": 2, "temperature": 1}
        ends.append(slow.post("/v1/completions", body, X_Request_Id=name))

    threads = [threading.Thread(target=ask, args=("mine", True)), threading.Thread(target=ask, args=("other", False))]
    for thread in threads:
        thread.start()
    wait(lambda: running(slow) >= 4)
    assert slow.post("/abort_requests", {"request_ids": ["cmpl-mine", "cmpl-unknown"]}).json == {"aborted": 1}
    threads[0].join(PATIENCE)
    assert ends[0].events[-1] == "[DONE]"
    reasons = {choice["finish_reason"] for event in ends[0].events[:-1] for choice in event["choices"]}
    assert "abort" in reasons
    assert slow.post("/abort_requests", {"request_ids": ["cmpl-other"]}).json == {"aborted": 1}
    threads[1].join(PATIENCE)
    assert {choice["finish_reason"] for choice in ends[1].json["choices"]} == {"abort"}
    assert slow.post("/abort_requests", {"request_ids": "all"}).status == 400
    assert slow.post("/abort_requests", {"ids": []}).error["param"] == "ids"


def test_sleep_is_rejected_while_requests_run(slow: Live) -> None:
    with slow.open_stream() as sock:
        until(sock, b"data: ")
        reply = slow.post("/sleep")
    assert (reply.status, reply.error["type"]) == (409, "ConflictError")
    assert reply.error["message"].startswith("Requests are in flight. Finish or abort them")
    assert slow.get("/is_sleeping").json == {"is_sleeping": False}


def test_sleeping(slow: Live, canary: Future[Reply]) -> None:
    canary.result()
    slow.wait_idle()
    asleep = {"status": "asleep", "level": 1, "memory_free_for": "all processes"}  # as on any CPU
    assert slow.post("/sleep?level=1").json == asleep
    try:
        assert slow.get("/is_sleeping").json == {"is_sleeping": True}
        health = slow.get("/health")
        assert (health.status, health.json["status"]) == (503, "asleep") and "/wake_up" in health.json["detail"]
        assert slow.get("/live").status == 200
        counted = slow.metrics().get(ASLEEP, 0)
        refused = slow.complete()
        assert slow.metrics()[ASLEEP] == counted + 1
        assert (refused.status, int(refused.headers["retry-after"])) == (503, 10)
        assert slow.metrics()['jaxserve:engine_sleep_state{sleep_state="weights_offloaded"}'] == 1
        assert slow.post("/sleep").status == 409
    finally:
        assert slow.post("/wake_up").json == {"status": "awake"}
    assert slow.post("/wake_up").status == 200
    assert slow.post("/sleep?level=3").error["param"] == "level"
    assert slow.metrics()['jaxserve:engine_sleep_state{sleep_state="awake"}'] == 1


def test_profiles_are_off(slow: Live) -> None:
    reply = slow.post("/start_profile")
    assert reply.status == 403
    assert "--profile-dir" in reply.error["message"]
    assert slow.post("/stop_profile").status == 409


def test_nothing_accumulates(slow: Live, canary: Future[Reply]) -> None:
    """Requests of all kinds, every third disconnected early: connections, files and memory are as before."""

    def some(number: int) -> None:
        with slow.open_stream(2, stream=number % 2 == 0, prompt="" if number % 5 == 0 else "a") as sock:
            if number % 3:
                answer(sock)

    def held() -> tuple[float, float, float]:
        now = slow.metrics()
        return now["jaxserve:http_connections"], now["process_open_fds"], slow.get("/load").json["server_load"]

    canary.result()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(some, range(40)))
        slow.wait_idle()
        wait(lambda: held()[0] == 1, 5)
        before, memory = held(), slow.metrics()["process_resident_memory_bytes"]
        list(pool.map(some, range(200)))
        slow.wait_idle()
        wait(lambda: held() == before, 5)
    assert slow.metrics()["process_resident_memory_bytes"] - memory < 2**24


def test_the_log(slow: Live) -> None:
    slow.post("/v1/completions", CANARY, X_Request_Id="evil\x1b[31m")
    slow.post("/v1/completions", CANARY | {"temperature": 0.5, "seed": 7}, X_Request_Id="mine-8")
    lines = [json.loads(line) for line in slow.log.splitlines() if line.startswith("{")]
    assert not any(c in slow.log for c in "\x1b\r")
    [mine] = [line for line in lines if line.get("id") == "mine-8"]
    assert mine["message"] == "POST /v1/completions"
    assert (mine["status"], mine["generated_tokens"], mine["finish"]) == (200, 40, "length")
    assert mine["ttft"] > 0 and mine["tokens_per_second"] > 0
    assert "'seed': 7" in mine["params"]
    assert "one two three" not in json.dumps(mine)


def test_a_prefix_cache_that_is_reset(slow: Live) -> None:
    prompt = {"prompt": "a b c d e f g h i j k l m n o p q r s", "max_tokens": 1}

    def cached() -> int:
        return slow.post("/v1/completions", prompt).json["usage"]["prompt_tokens_details"]["cached_tokens"]

    cached()
    assert cached() > 0
    assert slow.post("/reset_prefix_cache").json == {"status": "reset"}
    assert cached() == 0


def test_connections_are_reused_after_every_kind_of_answer(slow: Live) -> None:
    """A connection is reused after each kind of answer."""
    with slow.connect() as sock:
        for _ in range(3):
            sock.sendall(post("/v1/completions", b'{"prompt": "a", "max_tokens": 1}'))
            assert answer(sock).status == 200
            sock.sendall(post("/v1/completions", b'{"prompt": ""}'))
            assert answer(sock).status == 400
